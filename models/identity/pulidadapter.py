"""PuLID's adapters as values; see pulid.py for what the files hold."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .adapter import Adapter
from .pulid import FLUX, V1


@dataclass(frozen=True)
class PuLIDAdapter(Adapter):
    """An adapter of PuLID, on the socket STEER_ADAPTER. As for `Adapter`; image: width of EVA-CLIP's hidden states."""

    nodes: ClassVar[tuple[str, ...]] = ("SteerPuLID",)

    @property
    def kind(self):
        return self.variant

    @property
    def flux(self):
        return self.variant == FLUX

    @property
    def apart(self):
        """True where each picture has tokens of its own."""
        return self.variant == V1

    @property
    def eva(self):
        """Width of EVA-CLIP's embedding."""
        return self.patcher.model.image_proj.given - self.face

    @torch.no_grad()
    def keys_and_values(self, tokens, numbers):
        from comfy.model_management import load_models_gpu

        if not self.flux:
            return super().keys_and_values(tokens, numbers)
        load_models_gpu([self.patcher])
        tokens, layers = [e.to(self.patcher.load_device, torch.float32) for e in tokens], self.patcher.model.layers
        return {n: [layers[n].keys_and_values(e) for e in tokens] for n in numbers}

    def __str__(self):
        """What it is and what it needs, for people."""
        size = sum(p.numel() * p.element_size() for p in self.patcher.model.parameters()) / 2**20
        where = "between the blocks of Flux" if self.flux else "in the cross-attentions of a UNet" + self.made_for
        return (
            f"{self.name}: {self.variant}, {len(self.hidden)} layers {where}. Tokens for a person: {self.tokens}. "
            f"{size:,.0f} MB.\nTakes a face embedding ({self.face} numbers of antelopev2, not normalised) and what "
            f"EVA02-CLIP-L-14-336 sees of the face: its embedding ({self.eva} numbers) and hidden states (width "
            f"{self.image}) at five depths. For SteerPuLID."
        )
