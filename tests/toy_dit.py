"""Small random transformers of every architecture as ordinary MODEL objects, and ways to look inside one evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import comfy.model_base as mb
import torch
import toy
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from steer.patches.shared.architectures import adapter_of
from steer.patches.shared.steering import SHARE, Term, steer

TOKENS, WIDTH = 7, 48  # of the text

FLUX = dict(
    toy.FLUX, context_in_dim=WIDTH, num_heads=2, axes_dim=[16, 24, 24], depth=3, depth_single_blocks=4, qkv_bias=True
)
CHROMA = dict(
    image_model="chroma",
    in_channels=16,
    out_channels=16,
    context_in_dim=WIDTH,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=2,
    depth=3,
    depth_single_blocks=4,
    axes_dim=[16, 24, 24],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    in_dim=64,
    out_dim=128,
    hidden_dim=64,
    n_layers=2,
    txt_ids_dims=[],
    vec_in_dim=None,
)


SD3 = dict(
    in_channels=4,
    depth=2,  # heads of 64
    num_blocks=10,
    adm_in_channels=32,
    context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=WIDTH, out_features=128)),
    pos_embed_max_size=16,
    num_patches=256,
)
LUMINA = dict(
    image_model="lumina2",
    dim=128,
    n_layers=6,
    n_heads=2,
    n_kv_heads=1,
    multiple_of=32,
    qk_norm=True,
    cap_feat_dim=WIDTH,
    axes_dims=[16, 24, 24],
)
Z_IMAGE = dict(
    LUMINA, dim=256, n_heads=4, n_kv_heads=None, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32
)
QWEN = dict(
    image_model="qwen_image",
    in_channels=16,
    out_channels=4,
    num_layers=6,
    attention_head_dim=64,
    num_attention_heads=2,
    joint_attention_dim=WIDTH,
    axes_dims_rope=(16, 24, 24),
)
WAN = dict(image_model="wan2.1", dim=128, ffn_dim=512, num_heads=2, num_layers=10, text_dim=WIDTH, in_dim=4, out_dim=4)
HUNYUAN = dict(
    image_model="hunyuan_video",
    in_channels=4,
    out_channels=4,
    vec_in_dim=32,
    context_in_dim=WIDTH,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=2,
    depth=3,
    depth_single_blocks=4,
    axes_dim=[16, 24, 24],
    theta=256,
    patch_size=[1, 2, 2],
    qkv_bias=True,
    guidance_embed=True,
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)


def text_mask(seed):
    """Leaves out the last of 7 text tokens."""
    return {"attention_mask": (torch.arange(TOKENS)[None] < TOKENS - seed).long()}


def square_mask(seed):
    """Added to the scores of 7 text and 16 image tokens."""
    mask = torch.randn(1, 23, 23, generator=torch.Generator().manual_seed(seed))
    return {"attention_mask": mask, "attention_mask_img_shape": (4, 4)}


class Toy(NamedTuple):
    """How a small network is made, and what an oracle must know of it."""

    base: type
    config: dict
    adapter: str  # file of its adapter
    frames: int = 0  # of its latents; 0 for pictures
    before: int = 0  # attentions of the forward before the first block
    each: tuple = (1,)  # attentions from one block to the next, in turn
    patch: int = 2  # latents along the side of a token
    joint: bool = True  # text and image attend together
    least: int = 0  # text tokens, filled up by the host
    padding: int = 1  # text and image tokens come in multiples of it
    shares: bool = True  # rows may share blocks
    replaces: bool = True  # the host offers to replace its blocks
    controls: tuple = ()  # lists of ControlNet residuals it takes
    odd: bool = True  # the host fills odd sizes up
    mask: Callable | None = None  # seed -> a conditioning's options with an attention mask
    width: int = 128  # of its hidden states

    def attentions(self, blocks):
        """Attentions of the forward before block number `blocks`."""
        return self.before + sum(self.each[i % len(self.each)] for i in range(blocks))


TOYS = {
    "flux": Toy(mb.Flux, FLUX, "flux", controls=("input", "output"), mask=square_mask),
    "flux2": Toy(mb.Flux2, dict(FLUX, global_modulation=True, vec_in_dim=None, mlp_silu_act=True), "flux", least=512),
    "chroma": Toy(mb.Chroma, CHROMA, "flux", controls=("input", "output"), mask=square_mask),
    "radiance": Toy(
        mb.ChromaRadiance,
        dict(
            CHROMA,
            in_channels=4,
            out_channels=4,
            nerf_hidden_size=16,
            nerf_mlp_ratio=2,
            nerf_depth=1,
            nerf_max_freqs=2,
            nerf_tile_size=0,
            nerf_final_head_type="conv",
            nerf_embedder_dtype=None,
            use_x0=False,
            **{key: False for key in ("use_sequential_txt_ids",) if key in ChromaRadianceParams.__dataclass_fields__},
        ),
        "flux",
        shares=False,
    ),
    "sd3": Toy(mb.SD3, SD3, "sd3", controls=("output",)),
    "sd3.5 medium": Toy(mb.SD3, dict(SD3, x_block_self_attn=True, qk_norm="rms"), "sd3", each=(2,)),
    "lumina": Toy(mb.Lumina2, LUMINA, "lumina", before=4, replaces=False),
    "z-image": Toy(mb.Lumina2, Z_IMAGE, "lumina", before=4, padding=32, replaces=False),
    "z-image pixel": Toy(
        mb.ZImagePixelSpace,
        dict(Z_IMAGE, decoder_hidden_size=32, decoder_num_res_blocks=1, decoder_max_freqs=2),
        "lumina",
        before=4,
        padding=32,
        replaces=False,
        shares=False,
    ),
    "qwen": Toy(mb.QwenImage, QWEN, "qwen", frames=1, controls=("input",), mask=text_mask),
    "wan": Toy(mb.WAN21, WAN, "wan", frames=3, each=(2,), joint=False),
    "wan vace": Toy(
        mb.WAN21_Vace, dict(WAN, vace_layers=5, vace_in_dim=96), "wan", frames=3, each=(4, 2), joint=False, odd=False
    ),
    "hunyuan video": Toy(
        mb.HunyuanVideo, HUNYUAN, "hunyuan", frames=3, before=2, odd=False, controls=("input", "output")
    ),
    "hunyuan video 1.5": Toy(
        mb.HunyuanVideo15,
        dict(HUNYUAN, in_channels=9, patch_size=[1, 1, 1], vec_in_dim=None, use_cond_type_embedding=True),
        "hunyuan",
        frames=3,
        before=2,
        patch=1,
    ),
    "hunyuan image": Toy(
        mb.HunyuanImage21,
        dict(HUNYUAN, patch_size=[1, 1], axes_dim=[32, 32], vec_in_dim=None, guidance_embed=False),
        "hunyuan",
        before=2,
        patch=1,
    ),
}


def model(name, dtype=torch.float32, seed=0, change=dict):
    made = TOYS[name]
    patcher = toy.model(change(made.config), "flow", dtype, seed, made.base)
    network = patcher.model.diffusion_model
    for buffer in network.buffers():
        buffer.fill_(0.1)
    for embedding in (m for path, m in network.named_modules() if path.endswith("patch_embedding")):
        embedding.float()  # the host keeps Wan's so
    return patcher


def text(seed, tokens=TOKENS, **options):
    return toy.text(seed, tokens, WIDTH, **options)


def noise(name, batch=1, height=8, width=8, seed=0):
    """Starting noise for a toy; item i is the same in every batch."""
    frames = TOYS[name].frames
    start = toy.noise(seed, batch, height * max(frames, 1), width)
    return start.unflatten(2, (frames, height)) if frames else start


def sample(name, made, start=None, positive=None, negative=None, **options):
    given = {"steps": 1, **options, "start": noise(name) if start is None else start}
    return toy.sample(made, positive=positive or text(1), negative=negative or text(2, TOKENS), **given)


@dataclass(frozen=True)
class Probe(Term):
    """Asks for branches and keeps what each evaluation said."""

    weak: tuple = ()
    seen: list = field(default_factory=list, compare=False, repr=False)
    node = "Probe"

    def branches(self, model):
        return self.weak

    def add(self, call, extra, weight):
        self.seen.append({key: D.clone() for key, D in call.predictions.items()})


def predictions(name, made, weak, share=True, cfg=3.0, probe=Probe, **options):
    """What the network said of each branch in one evaluation: "positive", "negative" and each `Weak`."""
    probe = probe(weak=tuple(weak))
    steered = steer(made, probe)
    steered.model_options[SHARE] = share
    sample(name, steered, cfg=cfg, **options)
    (seen,) = probe.seen
    return seen


def alone(name, made, override=None, replace=None, **options):
    """The host's own D of the positive conditioning in a forward of its own, under patches that the host offers."""
    made = made.clone()
    to = made.model_options["transformer_options"]
    if override is not None:
        to["optimized_attention_override"] = override
    for key, function in (replace or {}).items():
        made.set_model_patch_replace(function, "dit", *key)
    seen = []
    sample(name, made, cfg=1.0, callback=lambda step, x0, x, total: seen.append(x0.clone()), **options)
    return seen[0]


class MaskedAttention:
    """An attention override that, in some of the forward's attentions, hides image tokens from each other by an
    explicit mask [N, N], and counts.

    numbers: of these attentions in the order of the forward.  first, count: of the image tokens; None for all.
    """

    def __init__(self, numbers, first, count):
        self.numbers, self.first, self.count, self.calls = numbers, first, count, 0

    def __call__(self, function, q, k, v, heads, mask=None, **kwargs):
        number, self.calls = self.calls, self.calls + 1
        if number not in self.numbers:
            return function(q, k, v, heads, mask, **kwargs)
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        n = q.shape[2]
        image = slice(0, n) if self.first is None else slice(self.first, self.first + self.count)
        hidden = torch.zeros(n, n, dtype=torch.bool)
        hidden[image, image] = True
        hidden.fill_diagonal_(False)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            mask = mask[:, None] if mask.ndim == 3 else mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def layers(made):
    """Its layers in forward order."""
    network = made.model.diffusion_model
    return tuple(dict.fromkeys(b.layer for b in adapter_of(made.model).blocks(network) if b.attends))


def masked(name, made, edited, tokens=TOKENS, height=8, width=8):
    """The oracle of attention with the identity in the layers `edited`."""
    about, order = TOYS[name], layers(made)
    numbers = [about.attentions(order.index(layer)) for layer in edited]
    if not about.joint:
        return MaskedAttention(numbers, None, None)
    count = max(about.frames, 1) * -(-height // about.patch) * -(-width // about.patch)
    return MaskedAttention(numbers, max(-(-tokens // about.padding) * about.padding, about.least), count)
