"""Networks that mix pictures into words of a prompt, as PhotoMaker (Li et al. 2023, arXiv 2312.04461) and FastComposer
(Xiao et al. 2023, arXiv 2305.10431) have them in their files:

    f = LN(MLP2(MLP1([t; e]) + t))     t: embedding of a word, e: of a picture; MLP2 adds its own input

Module names are the keys of the public files; every size is read off the shapes in one. `ops` is one of the host's
sets of layers (comfy.ops).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from .projectors import HEAD, below


class MLP(nn.Module):
    def __init__(self, shapes, ops, residual):
        super().__init__()
        (inner, given), (out, _) = shapes["fc1.weight"], shapes["fc2.weight"]
        self.layernorm, self.residual = ops.LayerNorm(given), residual
        self.fc1, self.fc2 = ops.Linear(given, inner), ops.Linear(inner, out)

    def forward(self, x):
        y = self.fc2(nn.functional.gelu(self.fc1(self.layernorm(x))))
        return x + y if self.residual else y


class Fuse(nn.Module):
    def __init__(self, shapes, ops):
        super().__init__()
        self.width = shapes["layer_norm.weight"][0]
        self.mlp1 = MLP(below(shapes, "mlp1."), ops, False)
        self.mlp2 = MLP(below(shapes, "mlp2."), ops, True)
        self.layer_norm = ops.LayerNorm(self.width)

    def forward(self, text, ids):
        return self.layer_norm(self.mlp2(self.mlp1(torch.cat((text, ids), -1)) + text))


def tower(shapes, ops):
    """(the host's CLIP image encoder without weights, side of the picture that it sees) of the shapes below
    "vision_model."."""
    from comfy.clip_model import CLIPVision

    positions, width = shapes["embeddings.position_embedding.weight"]
    channels, patch = shapes["embeddings.patch_embedding.weight"][1:3]
    config = dict(
        model_type="clip_vision_model", hidden_size=width, num_attention_heads=width // HEAD, num_channels=channels,
        num_hidden_layers=len({key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}),
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0], hidden_act="quick_gelu", patch_size=patch,
        image_size=round((positions - 1) ** 0.5) * patch,
    )
    return CLIPVision(config, None, None, ops), config["image_size"]


@dataclass(frozen=True)
class Fuser:
    """A file of this kind, as a value on the socket STEER_ADAPTER.

    tokens: words that a picture takes.  width: of the text.  size: side of the picture that its image encoder sees.
    face: width of the face embedding that it takes beside each picture, 0 for none.
    patcher: the host's ModelPatcher of its network: `embed(pixels, face)` and `fuse`.
    weights: what else the file holds for the diffusion model, as it stands there.
    """

    name: str
    tokens: int
    width: int
    size: int
    face: int = 0
    digest: str = ""
    patcher: Any = field(default=None, compare=False, repr=False)
    weights: dict = field(default_factory=dict, compare=False, repr=False)

    kind: ClassVar[str]
    nodes: ClassVar[tuple[str, ...]]

    @torch.no_grad()
    def embed(self, images, face=None):
        """e of images [n, h, w, 3] in 0..1, with the face embedding of each, [n, face], where it takes one: [n, tokens,
        width] on the CPU, in fp32."""
        given = [self.pixels(images.float())] + ([face] if self.face else [])
        return self._run("embed", *given)

    @torch.no_grad()
    def fuse(self, text, ids):
        """f of t [N, width] and e [N, width]; [N, width]."""
        return self._run("fuse", text, ids).to(text)

    def _run(self, what, *given):
        from comfy.model_management import load_models_gpu

        load_models_gpu([self.patcher])
        given = (x.to(self.patcher.load_device, torch.float32) for x in given)
        return getattr(self.patcher.model, what)(*given).cpu()

    @property
    def megabytes(self):
        return sum(p.numel() * p.element_size() for p in self.patcher.model.parameters()) / 2**20


def load(network, weights, name, what):
    """The host's ModelPatcher of a network on the device "meta", which gets these weights; ValueError where they do not
    fit."""
    import comfy.model_management as mm
    from comfy.model_patcher import CoreModelPatcher

    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name} looks like {what}, but its keys do not fit: {error}") from None
    network.requires_grad_(False).eval()
    return CoreModelPatcher(network, mm.get_torch_device(), mm.unet_offload_device())
