"""Stage "faceid": an IP-Adapter FaceID (Ye et al. 2023, 2308.06721, and its repository) for the exported Lab-UNet.

    adapter_faceid.safetensors   layout of the public FaceID files, with a LoRA; takes the reader's identity
"""

from dataclasses import replace

import numpy as np
import torch
from comfy.ops import disable_weight_init
from torch.nn.utils import parametrize

from ..identity import projectors
from . import adapters, common, data, load
from .captions import phrases, random_phrases
from .portrait import FACTORS, Portrait, draw
from .reader import load_reader

TOKENS, INNER = 4, 256  # of the projector
RANK = 8  # of the LoRA


class Low(torch.nn.ModuleDict):
    """W + up down for a weight W; begins as W."""

    def __init__(self, weight):
        out, given = weight.shape
        sizes = {"down": (given, RANK), "up": (RANK, out)}
        super().__init__({name: torch.nn.Linear(*size, bias=False) for name, size in sizes.items()})
        torch.nn.init.zeros_(self["up"].weight)

    def forward(self, weight):
        return weight + self["up"].weight @ self["down"].weight


def lora(unet):
    """Gives every attention of a UNet a LoRA -> {number in the files: {its name there: Low}}."""
    made, names = {}, {module: name for name, module in unet.named_modules()}
    for n, (_, attention) in enumerate(adapters.cross(unet)):
        of_itself = unet.get_submodule(names[attention].removesuffix("attn2") + "attn1")
        for i, each in enumerate((of_itself, attention)):
            layers = {"to_q": each.to_q, "to_k": each.to_k, "to_v": each.to_v, "to_out": each.to_out[0]}
            low = {f"{name}_lora": Low(linear.weight).to(linear.weight.device) for name, linear in layers.items()}
            for linear, change in zip(layers.values(), low.values(), strict=True):
                parametrize.register_parametrization(linear, "weight", change)
            made[str(2 * n + i)] = torch.nn.ModuleDict(low)
    return torch.nn.ModuleDict(made)


class Face(adapters.Trainer):
    """The reference is another picture of the person, who looks otherwise there; the text tells all but the face."""

    def __init__(self, work, name="adapter_faceid", seed=0, lr=2e-3):
        torch.manual_seed(seed)
        self.reader = load_reader().to(common.device())
        super().__init__(work, name, self.projector(), seed, lr)

    def projector(self):
        width = load.TEXT["hidden_size"]
        shapes = {"proj.0.weight": (INNER, 512), "proj.2.weight": (TOKENS * width, INNER)}
        return projectors.FaceMLP(shapes | {"norm.weight": (width,)}, disable_weight_init)

    def parts(self):
        return {"lora": lora(self.base.diffusion_model)}

    @torch.no_grad()
    def reference(self, portraits, given):
        images = torch.from_numpy(np.stack([draw(p) for p in portraits])).to(given.device).movedim(-1, 1).float() / 255
        return self.reader(images)[2] * given[:, None]

    def choose(self, portrait):
        parts = phrases(portrait) if self.rng.random() < 0.7 else random_phrases(portrait, self.rng)
        parts = [] if self.rng.random() < 0.1 else parts
        if self.rng.random() < 0.1:
            return parts, None
        other = Portrait.from_seed(self.rng.randrange(data.HELD_OUT))
        return parts, replace(portrait, **{name: getattr(other, name) for name in FACTORS})
