"""ELITE (Wei et al. 2023, arXiv 2302.13848): its two mappers, each with W_k and W_v for every cross-attention of SD1.4.

    global   a picture -> words: for each of five depths of the encoder, the class and the mean of the patches
    local    an object on black -> one token for each patch: the class and the patch, mean of the depths

The keys of both files are the same; only their names tell them apart. Module names are the keys of the public files.
"""

import re

import torch
from torch import nn

from .projectors import below
from .pulid import mlp

DEPTHS = 5
LAYER = re.compile(
    r"(down|up|mid)_blocks?_(?:(\d+)_)?attentions_(\d+)_transformer_blocks_(\d+)_attn2_to_([kv])\.weight"
)
ORDER = ("down", "up", "mid")


class Mapper(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        self.image, self.width = shapes["mapping_0.0.weight"][1], shapes["mapping_0.6.weight"][0]
        for i in range(DEPTHS):
            for name in (f"mapping_{i}", f"mapping_patch_{i}"):
                setattr(self, name, mlp(below(shapes, f"{name}."), ops))

    def forward(self, states, local=False):
        """Words [n, 5, width], or for `local` a token of each patch [n, P, width], of states [n, 5, 1 + P, image]."""
        found = []
        for i in range(DEPTHS):
            patches = getattr(self, f"mapping_patch_{i}")(states[:, i, 1:])
            patches = patches if local else patches.mean(1, keepdim=True)
            found.append(getattr(self, f"mapping_{i}")(states[:, i, :1]) + patches)
        return torch.stack(found).mean(0) if local else torch.cat(found, 1)


class Network(nn.Module):
    def __init__(self, shapes, layers, ops):
        super().__init__()
        self.image_proj = Mapper(shapes, ops)
        self.layers = nn.ModuleList(
            nn.ModuleDict({key: ops.Linear(*each[key].shape[::-1], bias=False) for key in ("to_k_ip", "to_v_ip")})
            for each in layers
        )


def matches(shapes):
    return "mapping_patch_0.0.weight" in shapes and any(LAYER.fullmatch(key) for key in shapes)


def from_state_dict(sd, name):
    """The `EliteMapper` of a flat state dict."""
    from comfy.ops import manual_cast

    from ...patches.shared.conditioning import digest
    from .eliteadapter import EliteMapper
    from .fuse import load

    found = {}
    for key, value in sd.items():
        if match := LAYER.fullmatch(key):
            part, *numbers, x = match.groups()
            place = (ORDER.index(part), *(int(n or 0) for n in numbers))
            found.setdefault(place, {})[f"to_{x}_ip"] = value
    layers = tuple(found[place] for place in sorted(found))
    mapper = {key: value for key, value in sd.items() if key.startswith("mapping_")}
    shapes = {key: tuple(value.shape) for key, value in mapper.items()}
    with torch.device("meta"):
        network = Network(shapes, layers, manual_cast)
    weights = {f"image_proj.{key}": value for key, value in mapper.items()}
    weights |= {f"layers.{n}.{key}.weight": w for n, layer in enumerate(layers) for key, w in layer.items()}
    patcher, projector = load(network, weights, name, "ELITE"), network.image_proj
    hidden = tuple(layer["to_k_ip"].shape[0] for layer in layers)
    told = digest([layers[0]["to_k_ip"], mapper["mapping_0.6.weight"]])
    return EliteMapper(
        name, "ELITE", 0, projector.width, hidden, projector.image, False, 0, told, patcher, weights=layers
    )
