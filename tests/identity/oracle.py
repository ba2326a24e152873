"""Random files of every variant, with the keys of the public ones, and what the papers' networks make of them.

The arithmetic is the official code's (Apache-2.0), read and written down again on bare tensors.
"""

import math

import torch
from torch.nn.functional import gelu, layer_norm, linear

HIDDEN = (64, 128, 128, 128, 64, 64, 128)  # cross-attentions of toy.UNET: encoder, decoder, middle
TEXT = 64  # width of its text
VARIANTS = (
    "base", "plus", "full-face", "faceid", "faceid-plus v1", "faceid-plus v2", "portrait", "face-resampler",
)
EMBEDDING, STATES = 48, 96  # widths of the test's image encoder


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def linears(**shapes):
    """{key: weight}, with a bias for each name that does not end in _."""
    made = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        key = name.rstrip("_").replace("__", ".")
        made[f"{key}.weight"] = rand(*shape, seed=seed)
        if not name.endswith("_"):
            made[f"{key}.bias"] = 0.1 * rand(shape[0], seed=seed + 100)
    return made


def norm(name, width, seed=7):
    return {f"{name}.weight": 1 + rand(width, seed=seed), f"{name}.bias": rand(width, seed=seed + 1)}


def resampler(width, given, out, queries=0, depth=2, inner=128, prefix=""):
    sd = linears(proj_in=(width, given), proj_out=(out, width)) | norm("norm_out", out)
    if queries:
        sd["latents"] = rand(1, queries, width, seed=3)
    for i in range(depth):
        sd |= {f"layers.{i}.0.{k}": v for k, v in (
            norm("norm1", width, i) | norm("norm2", width, i + 20)
            | linears(to_q_=(inner, width), to_kv_=(2 * inner, width), to_out_=(width, inner))
        ).items()}
        sd |= {f"layers.{i}.1.{k}": v for k, v in (
            norm("0", width, i + 30) | linears(**{"1_": (4 * width, width), "3_": (width, 4 * width)})
        ).items()}
    return {prefix + key: value for key, value in sd.items()}


def projector(variant, text=TEXT):
    if variant == "base":
        return linears(proj=(4 * text, EMBEDDING)) | norm("norm", text)
    if variant == "plus":
        return resampler(96, STATES, text, queries=16)
    if variant == "face-resampler":
        return resampler(96, 512, text, queries=16)
    if variant == "full-face":
        return linears(proj__0=(STATES, STATES), proj__2=(text, STATES)) | norm("proj.3", text)
    tokens = 16 if variant == "portrait" else 4
    sd = linears(proj__0=(1024, 512), proj__2=(tokens * text, 1024)) | norm("norm", text)
    return sd | resampler(text, STATES, text, prefix="perceiver_resampler.") if "plus" in variant else sd


def file(variant, hidden=HIDDEN, text=TEXT, seed=0):
    """{"image_proj": ..., "ip_adapter": ...} as the public .bin files have it."""
    layers = {}
    for n, width in enumerate(hidden):
        for i, key in enumerate(("to_k_ip", "to_v_ip")):
            layers[f"{2 * n + 1}.{key}.weight"] = rand(width, text, seed=1000 * seed + 2 * n + i)
        if "faceid" not in variant:
            continue
        for i in (2 * n, 2 * n + 1):
            given = {"to_k": text, "to_v": text} if i % 2 else {}
            for j, key in enumerate(("to_q", "to_k", "to_v", "to_out")):
                layers[f"{i}.{key}_lora.down.weight"] = rand(8, given.get(key, width), seed=10 * i + j)
                layers[f"{i}.{key}_lora.up.weight"] = rand(width, 8, seed=10 * i + j + 5000)
    return {"image_proj": projector(variant, text), "ip_adapter": layers}


def flat(tree):
    return {f"{part}.{key}": value for part, sd in tree.items() for key, value in sd.items()}


def _linear(sd, name, x):
    return linear(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"))


def _norm(sd, name, x):
    return layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])


def perceive(sd, x, latents, head=64):
    x = _linear(sd, "proj_in", x)
    i = 0
    while f"layers.{i}.0.to_q.weight" in sd:
        at = {k.removeprefix(f"layers.{i}."): v for k, v in sd.items()}
        seen, asking = _norm(at, "0.norm1", x), _norm(at, "0.norm2", latents)
        q = _linear(at, "0.to_q", asking)
        k, v = _linear(at, "0.to_kv", torch.cat((seen, asking), -2)).chunk(2, -1)
        q, k, v = (t.reshape(*t.shape[:2], -1, head).permute(0, 2, 1, 3) for t in (q, k, v))
        a = (q @ k.mT / math.sqrt(head)).softmax(-1) @ v
        latents = latents + _linear(at, "0.to_out", a.permute(0, 2, 1, 3).flatten(2))
        latents = latents + _linear(at, "1.3", gelu(_linear(at, "1.1", _norm(at, "1.0", latents))))
        i += 1
    return _norm(sd, "norm_out", _linear(sd, "proj_out", latents))


def tokens(variant, sd, x=None, face=None, scale=1.0):
    """Tokens [n, T, width] of the projector `sd`: x what the image encoder gives, face [n, 512]."""
    if variant == "base":
        return _norm(sd, "norm", _linear(sd, "proj", x).reshape(len(x), 4, -1))
    if variant == "full-face":
        return _norm(sd, "proj.3", _linear(sd, "proj.2", gelu(_linear(sd, "proj.0", x))))
    if variant in ("plus", "face-resampler"):
        x = face[:, None] if variant == "face-resampler" else x
        return perceive(sd, x, sd["latents"].repeat(len(x), 1, 1))
    e = _linear(sd, "proj.2", gelu(_linear(sd, "proj.0", face)))
    e = _norm(sd, "norm", e.reshape(len(face), 16 if variant == "portrait" else 4, -1))
    if "plus" not in variant:
        return e
    below = {k.removeprefix("perceiver_resampler."): v for k, v in sd.items() if k.startswith("perceiver")}
    seen = perceive(below, x, e)
    return seen if variant.endswith("v1") else e + scale * seen
