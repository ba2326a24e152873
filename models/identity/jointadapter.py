"""IP-Adapters for transformers as values; see joint.py for what the files hold."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .adapter import Adapter
from .joint import INSTANTX, TIMED, XLABS


@dataclass(frozen=True)
class JointAdapter(Adapter):
    """An adapter for the joint attention of a transformer, on the socket STEER_ADAPTER.

    As for `Adapter`; width: of its tokens.  hidden: widths of the blocks, double ones first.
    """

    nodes: ClassVar[tuple[str, ...]] = ("SteerIPAdapter",)

    @property
    def model(self):
        return "SD3.5" if self.variant == TIMED else "Flux"

    @property
    def after(self):
        """True where its answer is added to what blocks leave."""
        return self.variant == XLABS

    @property
    def timed(self):
        """True where its tokens depend on the time."""
        return self.variant == TIMED

    @property
    def headed(self):
        """True where it takes SigLIP's pooled picture, whose head the host leaves out."""
        return self.variant == INSTANTX

    @property
    def blank(self):
        return "black" if self.variant == XLABS else "zero"

    def project(self, seen, **options):
        """Tokens, as `Adapter` has them; of one that is timed the hidden states themselves, on the CPU."""
        return seen.float().cpu() if self.timed else super().project(seen, **options)

    @torch.no_grad()
    def keys_and_values(self, tokens, numbers):
        """As for `Adapter`; of one that is timed nothing, since they differ from step to step."""
        return {n: [None] * len(tokens) for n in numbers} if self.timed else super().keys_and_values(tokens, numbers)

    def __str__(self):
        """What it is and what it needs, for people."""
        size = sum(p.numel() * p.element_size() for p in self.patcher.model.parameters()) / 2**20
        lines = [
            f"{self.name}: IP-Adapter {self.variant}, for {len(self.hidden)} blocks of width {self.hidden[0]}. Tokens "
            f"for each picture: {self.tokens}. {size:,.0f} MB.",
            f"Takes the picture as a whole.\nImage encoder: {self.encoder}; from models/clip_vision.",
        ]
        if self.headed:
            lines.append("If that is SigLIP, its file must hold the pooling head too (vision_model.head).")
        return "\n".join(lines)
