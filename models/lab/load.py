"""The lab models as ordinary MODEL, CLIP and VAE objects of the host.

    MODEL  the host's UNetModel, eps-prediction, Stable Diffusion's noise schedule      unet.safetensors
           or the host's InstructPix2Pix, the same taking an image as channels too      unet_edit.safetensors
           or the host's Flux, rectified flow                                           dit.safetensors
    CLIP   the host's SD1 tokenizer and a two-layer CLIP text transformer               text.safetensors
           and the projection of its pooled text into CLIP_VISION's space               clip.safetensors
    VAE    the host's TAESD architecture                                                vae.safetensors
    CLIP_VISION  the host's CLIP image encoder, four layers                              vision.safetensors
    CONTROL_NET  the host's ControlNet for the UNet, InstantID's                         controlnet.safetensors
    STEER_TIME_PREDICTOR  for the UNet's noisy latents, and for the DiT's     time.safetensors, time_dit.safetensors
"""

import json
import tempfile
from pathlib import Path

import comfy.cldm.cldm
import comfy.clip_vision
import comfy.controlnet
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from safetensors import safe_open
from safetensors.torch import load_file

WEIGHTS = Path(__file__).parent / "weights"
MODELS = {
    "unet": "unet.safetensors",
    "unet-weak": "unet_weak.safetensors",
    "unet-edit": "unet_edit.safetensors",
    "dit": "dit.safetensors",
    "dit-weak": "dit_weak.safetensors",
}
TIMES = {"unet": "time.safetensors", "dit": "time_dit.safetensors"}  # time predictors
LATENT_STD = 0.4  # at std 1 the starting noise would still show the layout: Stable Diffusion's schedule ends at SNR > 0
FLOW_STD = 1.0  # of the DiT's latents: rectified flow starts at pure noise
TEXT = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
UNET = dict(
    image_size=16,
    in_channels=4,
    out_channels=4,
    model_channels=64,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    transformer_depth=[1, 1],
    transformer_depth_output=[1, 1, 1, 1],
    transformer_depth_middle=1,
    context_dim=TEXT["hidden_size"],
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    use_checkpoint=False,
    legacy=False,
)
EDIT = dict(in_channels=8)  # Lab-UNet that takes an image: its latent beside the noisy one
VISION = dict(
    model_type="clip_vision_model",
    image_size=128,
    patch_size=32,
    num_channels=3,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=768,
    hidden_act="gelu",
    projection_dim=128,
)
TOKENS = 48  # context of the DiT; its cost grows with every token, and captions have 41 at most
DIT = dict(
    image_model="flux",
    in_channels=4,
    out_channels=4,
    patch_size=2,
    vec_in_dim=TEXT["hidden_size"],
    context_in_dim=TEXT["hidden_size"],
    hidden_size=192,
    mlp_ratio=4.0,
    num_heads=3,
    depth=3,
    depth_single_blocks=5,
    axes_dim=[16, 24, 24],
    theta=100,
    qkv_bias=True,
    guidance_embed=False,
    txt_ids_dims=[],
)


class LabLatent(comfy.latent_formats.LatentFormat):
    """Whitens each channel of the VAE's latents to the standard deviation `scale`."""

    def __init__(self, stats, scale=LATENT_STD):
        self.scale = scale
        self.mean, self.std = (torch.tensor(stats[k]).view(1, 4, 1, 1) for k in ("mean", "std"))
        self.latent_rgb_factors = [[f * (LATENT_STD / scale) for f in row] for row in stats["rgb_factors"]]
        self.latent_rgb_factors_bias = stats["rgb_bias"]

    def process_in(self, latent):
        return (latent - self.mean.to(latent)) / self.std.to(latent) * self.scale

    def process_out(self, latent):
        return latent / self.scale * self.std.to(latent) + self.mean.to(latent)


class LabConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    memory_usage_factor = 1.0
    supported_inference_dtypes = [torch.float16, torch.bfloat16, torch.float32]


class LabFlowConfig(LabConfig):
    unet_extra_config = {}
    sampling_settings = {"shift": 0.0}  # the exponent of Flux's time shift: sigma = t


class LabSDTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        size, data = TEXT["hidden_size"], tokenizer_data or {}
        super().__init__(embedding_directory=embedding_directory, embedding_size=size, tokenizer_data=data)


class LabTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        data = tokenizer_data or {}
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=data, tokenizer=LabSDTokenizer)


class LabTextModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        options = model_options or {}
        options = {**options, "clip_l_model_config": {**TEXT, **options.get("clip_l_model_config", {})}}
        super().__init__(device=device, dtype=dtype, model_options=options)


def unet_model(stats, dtype=torch.float32, manual_cast=None, device="cpu", **changes):
    """A BaseModel with uninitialised weights; `stats` are the latents' moments (see LabLatent).

    With EDIT it is the host's SD15_instructpix2pix: as there, the image is given as the VAE encodes it, not whitened,
    so that zeros are no image.
    """
    config = LabConfig({**UNET, **changes})
    config.latent_format = LabLatent(stats)
    config.set_inference_dtype(dtype, manual_cast)
    build = comfy.model_base.SD15_instructpix2pix if changes.items() >= EDIT.items() else comfy.model_base.BaseModel
    return build(config, comfy.model_base.ModelType.EPS, device=torch.device(device))


def dit_model(stats, dtype=torch.float32, manual_cast=None, device="cpu", **changes):
    """A host Flux with uninitialised weights; `stats` are the latents' moments (see LabLatent)."""
    config = LabFlowConfig({**DIT, **changes})
    config.latent_format = LabLatent(stats, FLOW_STD)
    config.set_inference_dtype(dtype, manual_cast)
    return comfy.model_base.Flux(config, device=torch.device(device))


def latent_stats(which):
    """Moments of the latents that one of MODELS was trained on."""
    with safe_open(WEIGHTS / MODELS[which], "pt") as f:
        return json.loads(f.metadata()["latents"])


def load_unet(which="unet", disable_dynamic=False):
    """Any of MODELS -> ModelPatcher. Runs in the precision the host picks for its device (fp32 on a CPU)."""
    mm, edits = comfy.model_management, which == "unet-edit"
    whole = "unet" if edits else which  # the file for edits holds only what differs from Lab-UNet
    stats, weights = latent_stats(whole), load_file(WEIGHTS / MODELS[whole])
    if edits:
        weights |= load_file(WEIGHTS / MODELS[which])
    device, offload = mm.get_torch_device(), mm.unet_offload_device()
    supported = LabConfig.supported_inference_dtypes
    count = sum(w.numel() for w in weights.values())
    dtype = mm.unet_dtype(device=device, model_params=count, supported_dtypes=supported, weight_dtype=torch.float16)
    build = dit_model if which.startswith("dit") else unet_model
    model = build(stats, dtype, mm.unet_manual_cast(dtype, device, supported), offload, **(EDIT if edits else {}))
    kind = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", kind)
    patcher = kind(model, load_device=device, offload_device=offload)
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()  # dynamic VRAM streams the tensors it is given
    model.diffusion_model.load_state_dict({k: w.to(dtype) for k, w in weights.items()}, assign=dynamic)
    patcher.cached_patcher_init = (load_unet, (which,))  # how hooks and multi-GPU make another one like it
    return patcher


def load_clip(which="unet", **options):
    """-> CLIP. Tokens that no caption uses all share the row trained for unknown words.

    For the DiT a prompt is cut into pieces of TOKENS instead of 77; the encoder is causal, so the numbers are the same.
    """
    weights, position = load_file(WEIGHTS / "text.safetensors"), "text_model.embeddings.position_embedding.weight"
    if which.startswith("dit"):
        weights[position] = weights[position][:TOKENS]
    length = len(weights[position])
    options |= dict(
        tokenizer_data={"clip_l_max_length": length},
        model_options={"clip_l_model_config": {"max_position_embeddings": length}},
    )
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(LabTokenizer, LabTextModel), **options)
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    ids, rows = weights.pop("token_ids"), weights.pop("token_rows")
    full = rows[-1:].repeat(len(table), 1)
    full[ids.long()] = rows[:-1]
    weights["text_model.embeddings.token_embedding.weight"] = full
    weights |= load_file(WEIGHTS / "clip.safetensors")  # not applied by the host, as for SD1.x and Flux
    missing, unexpected = clip.load_sd({k: w.to(table.dtype) for k, w in weights.items()})
    if missing or unexpected:
        raise RuntimeError(f"text.safetensors does not fit the text encoder: {missing=}, {unexpected=}")
    clip.patcher.cached_patcher_init = (load_clip_patcher, (which,))
    return clip


def load_clip_patcher(which="unet", **options):
    return load_clip(which, **options).patcher


def load_vae():
    """-> VAE."""
    vae = comfy.sd.VAE(sd={k: w.float() for k, w in load_file(WEIGHTS / "vae.safetensors").items()})
    vae.patcher.cached_patcher_init = (load_vae_patcher, ())
    return vae


def load_vae_patcher(disable_dynamic=False):
    """What the host's own VAE factory does: a VAE's patcher is asked for in one kind only."""
    return load_vae().patcher


def vision_model(config):
    """The host's image encoder of this configuration, which older hosts only read from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return comfy.clip_vision.ClipVisionModel(path)


def load_vision():
    """-> CLIP_VISION."""
    vision = vision_model(VISION)
    weights = {k: w.to(vision.dtype) for k, w in load_file(WEIGHTS / "vision.safetensors").items()}
    missing, unexpected = vision.load_sd(weights)
    if missing or unexpected:
        raise RuntimeError(f"vision.safetensors does not fit the image encoder: {missing=}, {unexpected=}")
    return vision


def control_model(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init):
    """The host's ControlNet for Lab-UNet, with uninitialised weights."""
    config = {k: v for k, v in UNET.items() if k not in ("out_channels", "transformer_depth_output")}
    config |= LabConfig.unet_extra_config
    return comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=dtype, device=device, operations=operations)


def load_control(path=WEIGHTS / "controlnet.safetensors"):
    """-> CONTROL_NET for the keypoints of a face; its context is an identity's tokens, as InstantID's."""
    mm, weights = comfy.model_management, load_file(path)
    device, supported = mm.get_torch_device(), LabConfig.supported_inference_dtypes
    count = sum(w.numel() for w in weights.values())
    dtype = mm.unet_dtype(device=device, model_params=count, supported_dtypes=supported, weight_dtype=torch.float16)
    cast = mm.unet_manual_cast(dtype, device, supported)
    model = control_model(dtype, mm.unet_offload_device(), comfy.ops.pick_operations(dtype, cast))
    model.load_state_dict({k: w.to(dtype) for k, w in weights.items()})
    return comfy.controlnet.ControlNet(model, load_device=device, manual_cast_dtype=cast)


def load_time(which="unet"):
    """-> the time predictor of one of TIMES."""
    from ..measurement import timepredictor

    return timepredictor.load(WEIGHTS / TIMES[which])


def load_model(which="unet"):
    """-> (MODEL, CLIP, VAE) for one of MODELS."""
    if which not in MODELS:
        raise ValueError(f"SteerLabModel: model={which!r} is unknown; choose one of {', '.join(MODELS)}.")
    return load_unet(which), load_clip(which), load_vae()
