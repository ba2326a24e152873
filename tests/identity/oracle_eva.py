"""EVA02-CLIP files, small and random, with the keys of the public ones, and what the network makes of a picture: the
official arithmetic (MIT), read and written down again on bare tensors."""

import torch
from identity.oracle import linears, norm, rand
from identity.oracle_fuse import MEAN, STD
from identity.oracle_pulid import EVA, PATCHES, STATES
from torch.nn.functional import conv2d, layer_norm, linear, silu

BLOCKS, INNER, PATCH, HEADS = 22, 100, 6, STATES // 64
SIDE = int(PATCHES**0.5)
TIMM = (
    ("attn.q_bias", "attn.q_proj.bias"), ("attn.v_bias", "attn.v_proj.bias"), ("inner_attn_ln", "norm"),
    ("ffn_ln", "norm"), ("mlp.w1", "mlp.fc1_g"), ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2"),
)


def layer(n):
    sd = linears(
        attn__q_proj_=(STATES, STATES), attn__k_proj_=(STATES, STATES), attn__v_proj_=(STATES, STATES),
        attn__proj=(STATES, STATES), mlp__w1=(INNER, STATES), mlp__w2=(INNER, STATES), mlp__w3=(STATES, INNER),
    )
    sd = {key: value * (1 + n % 3) for key, value in sd.items()}
    sd |= {f"attn.{x}_bias": 0.3 * rand(STATES, seed=60 + i) for i, x in enumerate("qv")}
    sd |= norm("attn.inner_attn_ln", STATES, n) | norm("mlp.ffn_ln", INNER, n + 1)
    return sd | norm("norm1", STATES, n + 2) | norm("norm2", STATES, n + 3)


def file(blocks=BLOCKS):
    """As published: with a text encoder, and the tables of the turns in every block."""
    sd = {"cls_token": rand(1, 1, STATES, seed=1), "pos_embed": 5 * rand(1, PATCHES + 1, STATES, seed=2)}
    sd |= {"patch_embed.proj.weight": 0.3 * rand(STATES, 3, PATCH, PATCH, seed=3)}
    sd |= {"patch_embed.proj.bias": rand(STATES, seed=4)} | norm("norm", STATES) | linears(head=(EVA, STATES))
    for n in range(blocks):
        sd |= {f"blocks.{n}.{key}": value for key, value in layer(n).items()}
        sd |= {f"blocks.{n}.attn.rope.freqs_{x}": torch.zeros(PATCHES, 64) for x in ("cos", "sin")}
    sd |= {f"rope.freqs_{x}": torch.zeros(PATCHES, 64) for x in ("cos", "sin")}
    sd = {f"visual.{key}": value for key, value in sd.items()}
    return sd | {"text.blocks.0.mlp.weight": torch.ones(2), "logit_scale": torch.ones(())}


def as_timm(sd):
    """The same in the layout of timm, as it lies within open_clip's."""
    made = {}
    for key, value in sd.items():
        if key.startswith("visual.") and "rope" not in key:
            for ours, theirs in TIMM:
                key = key.replace(ours, theirs)
            made[key.replace("visual.", "visual.trunk.")] = value
    return made | {"text.token_embedding.weight": torch.ones(2, 2)}


def _turn(x):
    """Pairs of channels [n, heads, P, 64] times exp(i angle): the first half by the row, the second by the column."""
    x = torch.view_as_complex(x.double().unflatten(-1, (32, 2)).contiguous())
    out = torch.empty_like(x)
    for p in range(PATCHES):
        at = [t * 16 / SIDE for t in divmod(p, SIDE)]
        for j in range(32):
            angle = torch.tensor(at[j // 16] * 10000.0 ** (-2 * (j % 16) / 32), dtype=torch.float64)
            out[:, :, p, j] = x[:, :, p, j] * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(out).flatten(-2).float()


def seen(sd, images):
    """(embedding, hidden states before blocks 4, 8, 12, 16, 20) of images [n, SIDE * PATCH, SIDE * PATCH, 3]."""
    sd = {key.removeprefix("visual."): value for key, value in sd.items()}
    pixels = ((images - MEAN) / STD).movedim(-1, 1)
    x = conv2d(pixels, sd["patch_embed.proj.weight"], sd["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat((sd["cls_token"].expand(len(x), 1, STATES), x), 1) + sd["pos_embed"]
    states = []

    def normed(x, name):
        return layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"], 1e-6)

    for n in range(BLOCKS):
        if n in (4, 8, 12, 16, 20):
            states.append(x)
        at, y = f"blocks.{n}.attn.", normed(x, f"blocks.{n}.norm1")
        bias = {"q": sd[f"{at}q_bias"], "k": None, "v": sd[f"{at}v_bias"]}
        q, k, v = (
            linear(y, sd[f"{at}{c}_proj.weight"], bias[c]).unflatten(2, (HEADS, 64)).transpose(1, 2) for c in "qkv"
        )
        q, k = (torch.cat((t[:, :, :1], _turn(t[:, :, 1:])), 2) for t in (q, k))
        y = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(normed(y, f"{at}inner_attn_ln"), sd[f"{at}proj.weight"], sd[f"{at}proj.bias"])
        at, y = f"blocks.{n}.mlp.", normed(x, f"blocks.{n}.norm2")
        w1, w2 = (linear(y, sd[f"{at}{c}.weight"], sd[f"{at}{c}.bias"]) for c in ("w1", "w2"))
        y = silu(w1) * w2
        x = x + linear(normed(y, f"{at}ffn_ln"), sd[f"{at}w3.weight"], sd[f"{at}w3.bias"])
    return linear(normed(x, "norm")[:, 0], sd["head.weight"], sd["head.bias"]), states
