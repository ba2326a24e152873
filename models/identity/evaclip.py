"""EVA02-CLIP's image encoder (Sun et al. 2023, arXiv 2303.15389; Fang et al. 2023, arXiv 2303.11331), with which PuLID
looks at a face.

    x + proj(LN(A(R q, R k, v)))     R turns pairs of channels by the patch's row, then by its column, but not the class
    x + w3(LN(silu(w1 x) * w2 x))    each after a norm of x

Module names are the keys of the public file; the layout of timm is renamed to them.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import files
from .fastcomposer import MEAN, STD
from .projectors import attention, below

DEPTHS = (4, 8, 12, 16, 20)  # blocks before which PuLID takes the hidden states
HEAD, THETA, GRID, EPS = 64, 10000.0, 16, 1e-6  # channels of a head; of R, for a grid of so many patches; of the norms
MARKS = ("blocks.0.mlp.w1.weight", "blocks.0.mlp.fc1_g.weight")  # as published, as in timm
NAMES = (  # -> ours
    (".q_bias", ".q_proj.bias"), (".v_bias", ".v_proj.bias"), (".attn.norm.", ".attn.inner_attn_ln."),
    (".mlp.norm.", ".mlp.ffn_ln."), (".fc1_g.", ".w1."), (".fc1_x.", ".w2."), (".fc2.", ".w3."),
)
PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "head.")
SMALL = (1024, 257)  # width and tokens of EVA02-CLIP-L-14, whose keys are the same
WANTED = "PuLID needs EVA02-CLIP-L-14-336 (EVA02_CLIP_L_336_psz14_s6B)"


def angles(side):
    """[1 + side^2, 1, HEAD / 2]: by what R turns each pair of channels of the class and of the patches, row by row."""
    rates = THETA ** (-torch.arange(0, HEAD // 2, 2) / (HEAD // 2))
    places = torch.arange(side)[:, None] * (GRID / side) * rates
    both = torch.cat((places[:, None].expand(-1, side, -1), places[None].expand(side, -1, -1)), -1)
    return torch.cat((torch.zeros(1, HEAD // 2), both.flatten(0, 1)))[:, None]


def turned(x, cos, sin):
    """R x of [n, N, heads * HEAD]."""
    a, b = x.unflatten(2, (-1, HEAD // 2, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(2)


class Attention(nn.Module):
    def __init__(self, width, ops):
        super().__init__()
        self.heads = width // HEAD
        self.q_proj, self.v_proj, self.proj = (ops.Linear(width, width) for _ in range(3))
        self.k_proj = ops.Linear(width, width, bias=False)
        self.inner_attn_ln = ops.LayerNorm(width, eps=EPS)

    def forward(self, x, cos, sin):
        q, k = (turned(part(x), cos, sin) for part in (self.q_proj, self.k_proj))
        return self.proj(self.inner_attn_ln(attention(q, k, self.v_proj(x), self.heads)))


class Feed(nn.Module):
    def __init__(self, width, inner, ops):
        super().__init__()
        self.w1, self.w2, self.w3 = ops.Linear(width, inner), ops.Linear(width, inner), ops.Linear(inner, width)
        self.ffn_ln = ops.LayerNorm(inner, eps=EPS)

    def forward(self, x):
        return self.w3(self.ffn_ln(nn.functional.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    def __init__(self, width, inner, ops):
        super().__init__()
        self.norm1, self.norm2 = (ops.LayerNorm(width, eps=EPS) for _ in range(2))
        self.attn, self.mlp = Attention(width, ops), Feed(width, inner, ops)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        tokens, inner = shapes["pos_embed"][1], shapes["blocks.0.mlp.w1.weight"][0]
        self.side = round((tokens - 1) ** 0.5)
        self.size = self.side * patch
        self.patch_embed = nn.ModuleDict({"proj": ops.Conv2d(channels, width, patch, stride=patch)})
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.empty(shapes[key]), requires_grad=False) for key in ("cls_token", "pos_embed")
        )
        count = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
        self.blocks = nn.ModuleList(Block(width, inner, ops) for _ in range(count))
        self.norm, self.head = ops.LayerNorm(width, eps=EPS), ops.Linear(width, shapes["head.weight"][0])

    def forward(self, pixels):
        """(embedding [n, E], five states [n, 1 + P, width]) of pictures [n, 3, size, size], whitened."""
        x = self.patch_embed["proj"](pixels).flatten(2).movedim(1, 2)
        x = torch.cat((self.cls_token.to(x).expand(len(x), -1, -1), x), 1) + self.pos_embed.to(x)
        turns, states = angles(self.side).to(x), []
        cos, sin = turns.cos(), turns.sin()
        for n, block in enumerate(self.blocks):
            if n in DEPTHS:
                states.append(x)
            x = block(x, cos, sin)
        return self.head(self.norm(x)[:, 0]), states


@dataclass(frozen=True, eq=False)
class EVAClip:
    """An image encoder of EVA02-CLIP, as a value on the socket STEER_EVA_CLIP.

    size: side of the picture that it sees.  patcher: the host's ModelPatcher of `Network`.
    """

    name: str
    size: int
    patcher: Any = field(repr=False)

    @torch.no_grad()
    def see(self, images):
        """(embedding [n, E], five states [n, 1 + P, width]) of images [n, h, w, 3] in 0..1, on the CPU, in fp32."""
        from comfy.model_management import load_models_gpu

        load_models_gpu([self.patcher])
        images = images[..., :3].movedim(-1, 1).float().cpu()  # not every device has the bicubic filter
        small = nn.functional.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(t).to(small)[:, None, None] for t in (MEAN, STD))
        embedding, states = self.patcher.model(((small - mean) / std).to(self.patcher.load_device))
        return embedding.cpu(), [x.cpu() for x in states]


def load(path):
    """The `EVAClip` of a file; ValueError, naming the file and what it is, where it is none."""
    return from_state_dict(files.read(path), os.path.basename(path))


def from_state_dict(sd, name):
    """The same of a flat state dict; its text encoder is left out."""
    from comfy.ops import manual_cast

    from .fuse import load as patcher_of

    found = next((key for key in sd if key.endswith(MARKS)), None)
    if found is None:
        what = files.kind(sd) or f"unknown, with keys such as {', '.join(list(sd)[:3])}"
        raise ValueError(f"{name} is no EVA02-CLIP: it is {what}. {WANTED}.")
    weights = {}
    for key, value in below(sd, found[: found.index("blocks.0.")]).items():
        for theirs, ours in NAMES:
            key = key.replace(theirs, ours)
        if ".rope." not in key and key.startswith(PARTS):
            weights[key] = value
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    try:
        with torch.device("meta"):
            network = Network(shapes, manual_cast)
    except KeyError as error:
        raise ValueError(f"{name} looks like EVA02-CLIP, but has no {error}. {WANTED}.") from None
    if len(network.blocks) <= DEPTHS[-1]:
        raise ValueError(f"{name} is an EVA02-CLIP of {len(network.blocks)} blocks. {WANTED}.")
    if (shapes["cls_token"][-1], shapes["pos_embed"][1]) == SMALL:
        raise ValueError(f"{name} is EVA02-CLIP-L-14, which sees pictures of {network.size} pixels. {WANTED}.")
    return EVAClip(name, network.size, patcher_of(network, weights, name, "EVA02-CLIP"))
