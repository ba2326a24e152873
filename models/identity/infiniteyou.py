"""InfiniteYou's projector (Jiang et al. 2025, arXiv 2503.16418): a face embedding as the context of InfuseNet."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .fuse import load
from .projectors import Resampler, below

PREFIX = "image_proj."


@dataclass(frozen=True)
class InfiniteYou:
    """Its file, as a value on the socket STEER_ADAPTER.

    tokens: of a face.  width: of InfuseNet's context.  face: width of the face embedding.
    patcher: the host's ModelPatcher of the `Resampler`.
    """

    name: str
    tokens: int
    width: int
    face: int
    digest: str = ""
    patcher: Any = field(default=None, compare=False, repr=False)

    kind: ClassVar[str] = "InfiniteYou's projector"
    nodes: ClassVar[tuple[str, ...]] = ("SteerInfiniteYou",)

    @torch.no_grad()
    def project(self, face):
        """Tokens [n, T, width] on the CPU, in fp32, of face embeddings [n, face]."""
        from comfy.model_management import load_models_gpu

        load_models_gpu([self.patcher])
        return self.patcher.model(face.to(self.patcher.load_device, torch.float32)).cpu()

    def __str__(self):
        """What it is and what it needs, for people."""
        return (
            f"{self.name}: InfiniteYou's projector for a context of width {self.width}"
            f"{' (Flux)' if self.width == 4096 else ''}. Tokens: {self.tokens}.\nTakes a face embedding of "
            f"{self.face} numbers, of the ArcFace recogniser of facexlib. For SteerInfiniteYou, with InfuseNet from "
            "models/controlnet."
        )


def matches(shapes):
    """Its keys are those of a portrait adapter without layers."""
    face = shapes.get(f"{PREFIX}proj_in.weight", ())[1:] == (512,)
    return face and all(key.startswith(PREFIX) for key in shapes)


def from_state_dict(sd, name):
    """The `InfiniteYou` of a flat state dict."""
    from comfy.ops import manual_cast

    from ...patches.shared.conditioning import digest

    weights = below(sd, PREFIX)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    with torch.device("meta"):
        network = Resampler(shapes, manual_cast)
    told = digest([weights["proj_in.weight"][:1], weights["latents"]])
    patcher = load(network, weights, name, "InfiniteYou's projector")
    return InfiniteYou(name, network.tokens, shapes["proj_out.weight"][0], network.image, told, patcher)
