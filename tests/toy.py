"""Small random networks as ordinary MODEL objects of the host, conditionings for them, and ways to sample.

Random weights show wiring and arithmetic; what a method does to a picture is measured on the lab's trained models.
"""

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models_base
import torch
from comfy import latent_formats

UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=64,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    transformer_depth=[1, 1],
    transformer_depth_output=[1, 1, 1, 1],
    transformer_depth_middle=1,
    context_dim=64,
    use_spatial_transformer=True,
    use_checkpoint=False,
    legacy=False,
    use_linear_in_transformer=False,
    adm_in_channels=None,
)
SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1,
    context_dim=768,
    use_spatial_transformer=True,
    use_checkpoint=False,
    legacy=False,
    use_linear_in_transformer=False,
    adm_in_channels=None,
)
FLUX = dict(
    image_model="flux",
    in_channels=4,
    patch_size=2,
    out_channels=4,
    vec_in_dim=32,
    context_in_dim=64,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=1,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[16, 56, 56],
    theta=10000,
    qkv_bias=True,
    guidance_embed=False,
    txt_ids_dims=[],
)


def random_weights(module, seed=0):
    """Fills a module with weights that keep the signal at unit scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
            else:
                p.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)


def model(config=None, kind="eps", dtype=torch.float32, seed=0, base=comfy.model_base.BaseModel, cast=None):
    """A ModelPatcher around a random network. kind: "eps", "v" or "flow", as the host's model types.  cast: the dtype
    in which weights of `dtype` are used, as the host does with fp8."""

    class Config(comfy.supported_models_base.BASE):
        unet_config = {}
        unet_extra_config = {"num_heads": -1, "num_head_channels": 32} if base is comfy.model_base.BaseModel else {}
        latent_format = latent_formats.SD15
        memory_usage_factor = 1.0
        supported_inference_dtypes = [dtype]
        sampling_settings = {"shift": 1.15} if kind == "flow" else {}

    config = Config({**(config or UNET)})
    config.set_inference_dtype(dtype, cast)
    types = comfy.model_base.ModelType
    kind = {"eps": types.EPS, "v": types.V_PREDICTION, "flow": types.FLUX}[kind]
    made = base(config, kind, device=torch.device("cpu"))
    random_weights(made.diffusion_model, seed)
    made.diffusion_model.to(dtype)
    return comfy.model_patcher.ModelPatcher(made, mm.get_torch_device(), mm.unet_offload_device())


class GaussianNetwork(torch.nn.Module):
    """The exact eps of data that is Gaussian around the mean of the context: a smooth field with a known answer."""

    def __init__(self, std=0.5, device=None, operations=None, dtype=None, **_):
        super().__init__()
        self.std, self.dtype = std, torch.float32
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timesteps, context=None, transformer_options=None, **_):
        s = transformer_options["sigmas"][0]
        x = x * (1 + s**2).sqrt()
        mean = 4 * context.mean((1, 2)).view(-1, 1, 1, 1).tanh()
        share = self.std**2 / (self.std**2 + s**2)
        return (x - mean - share * (x - mean)) / s


def gaussian():
    """A MODEL whose network is `GaussianNetwork`."""

    class Gaussian(comfy.model_base.BaseModel):
        def __init__(self, config, kind, device=None):
            super().__init__(config, kind, device=device, unet_model=GaussianNetwork)

    return model(kind="eps", base=Gaussian)


def flux():
    """A Flux small enough for a CPU."""
    return model(FLUX, "flow", base=comfy.model_base.Flux)


def controlnet(hint, strength=1.0, config=UNET):
    """A random ControlNet for `config` with a hint image [1, 3, H, W], as ControlNetApply puts it on a conditioning."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    # the output side of the UNet has no counterpart in a ControlNet
    config = {k: v for k, v in config.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, num_head_channels=32, device="cpu", operations=comfy.ops.manual_cast
    )
    random_weights(network, 3)
    return comfy.controlnet.ControlNet(network, load_device=mm.get_torch_device()).set_cond_hint(hint, strength)


def text(seed, tokens=77, width=64, **options):
    """A CONDITIONING as CLIPTextEncode gives it."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 32, generator=generator), **options}]]


POSITIVE, NEGATIVE = text(1), text(2)


def noise(seed=0, batch=1, height=16, width=16, channels=4):
    """Starting noise, item by item, so that item i is the same in every batch."""
    seeds = (torch.Generator().manual_seed(seed + i) for i in range(batch))
    return torch.stack([torch.randn(channels, height, width, generator=g) for g in seeds])


def sigmas(model, steps=4, scheduler="normal"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def sample(
    model,
    cfg=5.0,
    sampler="euler",
    steps=4,
    positive=POSITIVE,
    negative=NEGATIVE,
    start=None,
    latent=None,
    seed=7,
    guider=None,
    **options,
):
    """A latent, sampled as KSampler does it, or by the given guider."""
    start = noise() if start is None else start
    latent = torch.zeros_like(start) if latent is None else latent
    if guider is None:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    schedule = options.pop("sigmas", None)
    schedule = sigmas(model, steps) if schedule is None else schedule
    with torch.inference_mode():
        return guider.sample(start, latent, sampler, schedule, seed=seed, disable_pbar=True, **options)


class count_forwards:
    """Counts forwards and rows of a model's network while it is open."""

    def __init__(self, model):
        self.module = model.model.diffusion_model
        self.calls, self.rows = 0, 0

    def __enter__(self):
        self.handle = self.module.register_forward_pre_hook(self._count)
        return self

    def _count(self, module, args):
        self.calls += 1
        self.rows += args[0].shape[0]

    def __exit__(self, *error):
        self.handle.remove()
