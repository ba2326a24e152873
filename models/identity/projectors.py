"""Projectors: networks that turn what an encoder sees in a picture into tokens for a diffusion model's attention.

    Linear          image_embeds [n, E] -> T tokens                    IP-Adapter (Ye et al. 2023, arXiv 2308.06721)
    MLP             hidden states [n, P, E] -> P tokens                IP-Adapter full-face
    Resampler       any sequence [n, P, E] -> T tokens                 IP-Adapter plus; InstantID and kin from a face
    FaceMLP         face [n, 512] -> T tokens                          IP-Adapter FaceID, portrait
    FaceResampler   face [n, 512], hidden states [n, P, E] -> T        IP-Adapter FaceID plus

Module names are the keys of the public files; every size is read off the shapes in one. `ops` is one of the host's
sets of layers (comfy.ops). Each knows its `tokens` for a picture (0: one for each patch), and the widths of what it
takes: `image` of the image encoder, `face` of the face embedding; 0 for neither.
"""

import torch
from torch import nn

HEAD = 64  # channels of a head: the same in all these files, and not to be seen in them


def attention(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v of [n, N, heads * d]."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Perceiver(nn.Module):
    """Latents ask a sequence and themselves (Jaegle et al. 2021, as in Flamingo)."""

    def __init__(self, shapes, ops, head=HEAD):
        super().__init__()
        inner, width = shapes["to_q.weight"]
        self.heads = inner // head
        self.norm1 = ops.LayerNorm(width)
        self.norm2 = ops.LayerNorm(width)
        self.to_q = ops.Linear(width, inner, bias=False)
        self.to_kv = ops.Linear(width, 2 * inner, bias=False)
        self.to_out = ops.Linear(inner, width, bias=False)

    def forward(self, x, latents):
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat((x, latents), 1)).chunk(2, -1)
        return self.to_out(attention(self.to_q(latents), k, v, self.heads))


class Resampler(nn.Module):
    """`latents` of its own, or given ones, through layers of `Perceiver` and feed-forward over a sequence x [n, P, E],
    or one thing [n, E]."""

    def __init__(self, shapes, ops, head=HEAD):
        super().__init__()
        if "latents" in shapes:
            self.latents = nn.Parameter(torch.empty(shapes["latents"]), requires_grad=False)
        width, given = shapes["proj_in.weight"]
        out = shapes["proj_out.weight"][0]
        self.tokens, self.image, self.face = shapes.get("latents", (1, 0))[1], given, 0
        self.proj_in, self.proj_out = ops.Linear(given, width), ops.Linear(width, out)
        self.norm_out = ops.LayerNorm(out)
        self.layers = nn.ModuleList()
        while f"layers.{len(self.layers)}.0.to_q.weight" in shapes:
            layer = below(shapes, f"layers.{len(self.layers)}.")
            inner = layer["1.1.weight"][0]
            feed = (ops.LayerNorm(width), ops.Linear(width, inner, bias=False), nn.GELU(),
                    ops.Linear(inner, width, bias=False))
            self.layers.append(nn.ModuleList((Perceiver(below(layer, "0."), ops, head), nn.Sequential(*feed))))

    def forward(self, x, latents=None):
        x = self.proj_in(x[:, None] if x.ndim == 2 else x)
        latents = self.latents.to(x).expand(len(x), -1, -1) if latents is None else latents
        for attend, feed in self.layers:
            latents = attend(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm_out(self.proj_out(latents))


class Linear(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        (out, given), (width,) = shapes["proj.weight"], shapes["norm.weight"]
        self.proj, self.norm = ops.Linear(given, out), ops.LayerNorm(width)
        self.tokens, self.image, self.face = out // width, given, 0

    def forward(self, x):
        return self.norm(self.proj(x).unflatten(-1, (-1, *self.norm.normalized_shape)))


class MLP(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        (inner, given), (out, _) = shapes["proj.0.weight"], shapes["proj.2.weight"]
        self.proj = nn.Sequential(ops.Linear(given, inner), nn.GELU(), ops.Linear(inner, out), ops.LayerNorm(out))
        self.tokens, self.image, self.face = 0, given, 0

    def forward(self, x):
        return self.proj(x)


class FaceMLP(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        (inner, given), (out, _), (width,) = (shapes[key] for key in ("proj.0.weight", "proj.2.weight", "norm.weight"))
        self.proj = nn.Sequential(ops.Linear(given, inner), nn.GELU(), ops.Linear(inner, out))
        self.norm = ops.LayerNorm(width)
        self.tokens, self.image, self.face = out // width, 0, given

    def forward(self, face):
        return self.norm(self.proj(face).unflatten(-1, (-1, *self.norm.normalized_shape)))


class FaceResampler(FaceMLP):
    """structure: how much the picture adds to the face's tokens, version 2; None for its tokens alone, version 1."""

    def __init__(self, shapes, ops):
        super().__init__(shapes, ops)
        self.perceiver_resampler = Resampler(below(shapes, "perceiver_resampler."), ops)
        self.image = self.perceiver_resampler.image

    def forward(self, face, x, structure=None):
        tokens = super().forward(face)
        seen = self.perceiver_resampler(x, tokens)
        return seen if structure is None else tokens + structure * seen


def below(shapes, prefix):
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in shapes.items() if key.startswith(prefix)}
