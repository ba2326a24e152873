"""PuLID (Guo et al. 2024, arXiv 2404.16022): files for SDXL (v1, v1.1) and Flux (0.9.0, 0.9.1).

    IDEncoder   v1: who it is -> 5 tokens, and one for each of five depths of EVA-CLIP
    IDFormer    v1.1 and Flux: queries and who it is ask EVA-CLIP, from shallow to deep
    Cross       Flux: image tokens ask the identity between the blocks

Module names are the keys of the public files. Who it is: the face recogniser's embedding and EVA-CLIP's, one after the
other, [n, 512 + 768]; states: of EVA-CLIP's blocks, [n, 5, P, 1024].
"""

import re

import torch
from torch import nn

from .projectors import Perceiver, attention, below

V1, V1_1, FLUX = "PuLID v1", "PuLID v1.1", "PuLID Flux"
DEPTHS, FACE, HEAD = 5, 512, 128  # hidden states taken; widths of a face embedding, and of a head of `Cross`


def mlp(shapes, ops):
    """Three linear layers with norms between them, of the shapes below a prefix."""
    (a, given), (b, _), (out, _) = (shapes[f"{n}.weight"] for n in (0, 3, 6))
    return nn.Sequential(
        ops.Linear(given, a), ops.LayerNorm(a), nn.LeakyReLU(), ops.Linear(a, b), ops.LayerNorm(b), nn.LeakyReLU(),
        ops.Linear(b, out),
    )


class IDEncoder(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        self.width, self.image = shapes["mapping_0.6.weight"][0], shapes["mapping_0.0.weight"][1]
        self.body, self.given = mlp(below(shapes, "body."), ops), shapes["body.0.weight"][1]
        self.own = shapes["body.6.weight"][0] // self.width  # tokens of who it is
        self.tokens = self.own + DEPTHS
        for i in range(DEPTHS):
            for name in (f"mapping_{i}", f"mapping_patch_{i}"):
                setattr(self, name, mlp(below(shapes, f"{name}."), ops))

    def forward(self, who, states):
        """Tokens [n, T, width]."""
        x = [self.body(who).unflatten(1, (-1, self.width))]
        for i in range(DEPTHS):
            first, patches = states[:, i, :1], states[:, i, 1:]
            mean = getattr(self, f"mapping_patch_{i}")(patches).mean(1, keepdim=True)
            x.append(getattr(self, f"mapping_{i}")(first) + mean)
        return torch.cat(x, 1)


class IDFormer(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        self.latents, self.proj_out = (
            nn.Parameter(torch.empty(shapes[key]), requires_grad=False) for key in ("latents", "proj_out")
        )
        _, self.tokens, dim = shapes["latents"]
        self.width, self.image = shapes["proj_out"][1], shapes["mapping_0.0.weight"][1]
        self.id_embedding_mapping = mlp(below(shapes, "id_embedding_mapping."), ops)
        self.given = shapes["id_embedding_mapping.0.weight"][1]
        for i in range(DEPTHS):
            setattr(self, f"mapping_{i}", mlp(below(shapes, f"mapping_{i}."), ops))
        self.layers = nn.ModuleList()
        while f"layers.{len(self.layers)}.0.to_q.weight" in shapes:
            layer = below(shapes, f"layers.{len(self.layers)}.")
            inner = layer["1.1.weight"][0]
            feed = (ops.LayerNorm(dim), ops.Linear(dim, inner, bias=False), nn.GELU(),
                    ops.Linear(inner, dim, bias=False))
            self.layers.append(nn.ModuleList((Perceiver(below(layer, "0."), ops), nn.Sequential(*feed))))

    def forward(self, who, states):
        """Tokens [1, T, width] of n pictures of one person."""
        latents, each = self.latents.to(who), len(self.layers) // DEPTHS
        who = self.id_embedding_mapping(who).reshape(1, -1, latents.shape[-1])
        latents = torch.cat((latents, who), 1)
        for i in range(DEPTHS):
            seen = getattr(self, f"mapping_{i}")(states[:, i].flatten(0, 1)[None])
            for ask, feed in self.layers[i * each : (i + 1) * each]:
                latents = ask(torch.cat((who, seen), 1), latents) + latents
                latents = feed(latents) + latents
        return latents[:, : self.tokens] @ self.proj_out.to(latents)


class Cross(nn.Module):
    """The identity's answer to image tokens; its keys and values do not depend on them."""

    def __init__(self, shapes, ops):
        super().__init__()
        (inner, width), given = shapes["to_q.weight"], shapes["norm1.weight"][0]
        self.heads, self.width = inner // HEAD, width
        self.norm1, self.norm2 = ops.LayerNorm(given), ops.LayerNorm(width)
        self.to_q = ops.Linear(width, inner, bias=False)
        self.to_kv = ops.Linear(given, 2 * inner, bias=False)
        self.to_out = ops.Linear(inner, width, bias=False)

    def keys_and_values(self, e):
        return self.to_kv(self.norm1(e)).chunk(2, -1)

    def forward(self, x, k, v):
        return self.to_out(attention(self.to_q(self.norm2(x)), k, v, self.heads))


class Network(nn.Module):
    def __init__(self, variant, image, layers, ops):
        super().__init__()
        self.image_proj = (IDEncoder if variant == V1 else IDFormer)(image, ops)
        self.layers = nn.ModuleList(
            Cross(each, ops) if variant == FLUX else nn.ModuleDict({
                key: ops.Linear(*each[f"{key}.weight"][::-1], bias=False) for key in ("to_k_ip", "to_v_ip")
            })
            for each in layers
        )


def variant_of(shapes):
    """Which of these a file with these keys is; None for none."""
    marks = {
        FLUX: ("pulid_ca.0.to_q.weight",), V1_1: ("id_adapter.latents",), V1: ("id_adapter.body.0.weight",
                                                                            "image_proj.body.0.weight"),
    }
    return next((variant for variant, keys in marks.items() if any(key in shapes for key in keys)), None)


def matches(shapes):
    return variant_of(shapes) is not None


def from_state_dict(sd, name):
    """The `PuLIDAdapter` of a flat state dict."""
    from comfy.ops import manual_cast

    from ...patches.shared.conditioning import digest
    from .fuse import load
    from .pulidadapter import PuLIDAdapter

    variant = variant_of(sd)
    image, layers = (  # as published, or as it was converted to the layout of IP-Adapter
        next(filter(None, (below(sd, prefix) for prefix in prefixes)), {}) for prefixes in (
            ("pulid_encoder.", "id_adapter.", "image_proj."), ("pulid_ca.", "id_adapter_attn_layers.", "ip_adapter."),
        )
    )
    layers = {re.sub(r"\.id_to_([kv])\.", r".to_\1_ip.", key): value for key, value in layers.items()}
    numbers = sorted({int(key.split(".")[0]) for key in layers})
    places = {str(n): str(place) for place, n in enumerate(numbers)}
    layers = {re.sub(r"^\d+", lambda n: places[n[0]], key): value for key, value in layers.items()}
    shapes, sizes = ({key: tuple(value.shape) for key, value in part.items()} for part in (image, layers))
    with torch.device("meta"):
        network = Network(variant, shapes, [below(sizes, f"{n}.") for n in range(len(numbers))], manual_cast)
    weights = {f"image_proj.{k}": v for k, v in image.items()} | {f"layers.{k}": v for k, v in layers.items()}
    first, width = ("to_q", 1) if variant == FLUX else ("to_k_ip", 0)
    told = digest([layers[f"0.{first}.weight"], *list(image.values())[-2:]])
    patcher = load(network, weights, name, variant)
    hidden = tuple(sizes[f"{n}.{first}.weight"][width] for n in range(len(numbers)))
    projector = network.image_proj
    return PuLIDAdapter(
        name, variant, projector.tokens, projector.width, hidden, projector.image, False, FACE, told, patcher
    )
