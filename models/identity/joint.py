"""IP-Adapters for transformers, in which text and image share one attention:

    XLabs       Flux: W_k, W_v of a few tokens of the picture; what they answer is added after each double block
    InstantX    Flux: 128 tokens of SigLIP's pooled picture, in the attention of all blocks, keys and values of RMS 1
    InstantX 3  Stable Diffusion 3.5: tokens and their keys depend on the time; the image's own keys are asked with them

Module names are the keys of the public files, without what stands before the number of a layer.
"""

import math
import re

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, silu

from .projectors import FaceMLP, Linear, Perceiver, attention, below

XLABS, INSTANTX, TIMED = "XLabs Flux", "InstantX Flux", "InstantX SD3.5"
MARKS = {  # key that none of the others has
    XLABS: "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
    TIMED: "ip_adapter.0.norm_ip.linear.weight",
    INSTANTX: "ip_adapter.0.to_k_ip.weight",  # layers of UNets have odd numbers
}
EPS = 1e-6


class PooledMLP(FaceMLP):
    """SigLIP's pooled picture [n, E] -> T tokens."""

    def __init__(self, shapes, ops):
        super().__init__(shapes, ops)
        self.image, self.face = self.face, 0


class TimeResampler(nn.Module):
    """Latents ask hidden states x [n, P, E]; what they ask with is shifted and scaled by the time."""

    def __init__(self, shapes, ops):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(shapes["latents"]), requires_grad=False)
        (width, given), (out, _) = shapes["proj_in.weight"], shapes["proj_out.weight"]
        self.tokens, self.image, self.face = shapes["latents"][1], given, 0
        self.proj_in, self.proj_out = ops.Linear(given, width), ops.Linear(width, out)
        self.norm_out = ops.LayerNorm(out)
        self.frequencies = shapes["time_embedding.linear_1.weight"][1]
        self.time_embedding = nn.ModuleDict({
            "linear_1": ops.Linear(self.frequencies, width), "linear_2": ops.Linear(width, width),
        })
        self.layers = nn.ModuleList()
        while f"layers.{len(self.layers)}.0.to_q.weight" in shapes:
            layer = below(shapes, f"layers.{len(self.layers)}.")
            inner = layer["1.1.weight"][0]
            feed = (ops.LayerNorm(width), ops.Linear(width, inner, bias=False), nn.GELU(),
                    ops.Linear(inner, width, bias=False))
            time = nn.Sequential(nn.SiLU(), ops.Linear(width, 4 * width))
            self.layers.append(nn.ModuleList((Perceiver(below(layer, "0."), ops), nn.Sequential(*feed), time)))

    def forward(self, x, t):
        """(tokens [n, T, width], embedding of the time [n, C]) at t [1], 1000 for pure noise."""
        half = self.frequencies // 2
        angle = t.float() * torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / half))
        time = torch.cat((angle.cos(), angle.sin())).to(x)[None].expand(len(x), -1)
        time = self.time_embedding["linear_2"](silu(self.time_embedding["linear_1"](time)))
        x, latents = self.proj_in(x) + time[:, None], self.latents.to(x).expand(len(x), -1, -1)
        for ask, feed, of_time in self.layers:
            shift, scale, shift_2, scale_2 = of_time(time)[:, None].chunk(4, -1)
            asking = ask.norm2(latents) * (1 + scale) + shift
            k, v = ask.to_kv(torch.cat((ask.norm1(x), asking), 1)).chunk(2, -1)
            latents = latents + ask.to_out(attention(ask.to_q(asking), k, v, ask.heads))
            latents = latents + feed[3](gelu(feed[1](feed[0](latents) * (1 + scale_2) + shift_2)))
        return self.norm_out(self.proj_out(latents)), time


class Pair(nn.ModuleDict):
    """W_k and W_v of a layer."""

    def __init__(self, shapes, ops):
        out, given = shapes["to_k_ip.weight"]
        bias = "to_k_ip.bias" in shapes
        super().__init__({key: ops.Linear(given, out, bias=bias) for key in ("to_k_ip", "to_v_ip")})


class TimedPair(nn.Module):
    """The same of tokens that are shifted and scaled by the time, with norms of queries and keys."""

    def __init__(self, shapes, ops):
        super().__init__()
        out, given = shapes["to_k_ip.weight"]
        self.norm_ip = nn.ModuleDict({"linear": ops.Linear(*shapes["norm_ip.linear.weight"][::-1])})
        self.to_k_ip, self.to_v_ip = (ops.Linear(given, out, bias=False) for _ in "kv")
        for name in ("norm_q", "norm_k", "norm_ip_k"):
            setattr(self, name, ops.RMSNorm(shapes[f"{name}.weight"][0], eps=EPS))

    def forward(self, e, time):
        """(k, v), each [n, T, width], of tokens e [n, T, width]."""
        shift, scale = self.norm_ip["linear"](silu(time))[:, None].chunk(2, -1)
        e = layer_norm(e, e.shape[-1:], eps=EPS) * (1 + scale) + shift
        return self.by_head("norm_ip_k", self.to_k_ip(e)), self.to_v_ip(e)

    def by_head(self, name, x):
        norm = getattr(self, name)
        return norm(x.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2)


class Network(nn.Module):
    def __init__(self, variant, image, layers, ops):
        super().__init__()
        projector = {XLABS: Linear, INSTANTX: PooledMLP, TIMED: TimeResampler}[variant]
        self.image_proj = projector(image, ops)
        self.layers = nn.ModuleList((TimedPair if variant == TIMED else Pair)(each, ops) for each in layers)


def variant_of(shapes):
    """Which of these a file with these keys is; None for none."""
    if "image_proj.proj.2.weight" not in shapes and MARKS[INSTANTX] in shapes and MARKS[TIMED] not in shapes:
        return None
    return next((variant for variant, key in MARKS.items() if key in shapes), None)


def matches(shapes):
    return variant_of(shapes) is not None and not any("_lora." in key for key in shapes)


def from_state_dict(sd, name):
    """The `JointAdapter` of a flat state dict."""
    from comfy.ops import manual_cast

    from ...patches.shared.conditioning import digest
    from .fuse import load
    from .jointadapter import JointAdapter

    variant = variant_of(sd)
    if variant == XLABS:
        image, layers = below(sd, "ip_adapter_proj_model."), {
            re.sub(r"(\d+)\.processor\.ip_adapter_double_stream_(k|v)_proj", r"\1.to_\2_ip", key): value
            for key, value in below(sd, "double_blocks.").items()
        }
    else:
        image, layers = below(sd, "image_proj."), below(sd, "ip_adapter.")
    shapes, sizes = ({key: tuple(value.shape) for key, value in part.items()} for part in (image, layers))
    count = 1 + max(int(key.split(".")[0]) for key in layers)
    with torch.device("meta"):
        network = Network(variant, shapes, [below(sizes, f"{n}.") for n in range(count)], manual_cast)
    weights = {f"image_proj.{k}": v for k, v in image.items()} | {f"layers.{k}": v for k, v in layers.items()}
    told = digest([layers["0.to_k_ip.weight"], *list(image.values())[-2:]])
    patcher = load(network, weights, name, f"IP-Adapter {variant}")
    hidden = tuple(sizes[f"{n}.to_k_ip.weight"][0] for n in range(count))
    projector, width = network.image_proj, sizes["0.to_k_ip.weight"][1]
    return JointAdapter(
        name, variant, projector.tokens, width, hidden, projector.image, variant != TIMED, 0, told, patcher
    )
