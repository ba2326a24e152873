"""ELITE's mappers as values; see elite.py for what the files hold."""

from dataclasses import dataclass, field
from typing import ClassVar

from .adapter import Adapter


@dataclass(frozen=True)
class EliteMapper(Adapter):
    """One of ELITE's mappers, on the socket STEER_ADAPTER. weights: ({"to_k_ip": W_k, "to_v_ip": W_v}, ...) as in the
    file, for each layer."""

    weights: tuple = field(default=(), compare=False, repr=False)
    nodes: ClassVar[tuple[str, ...]] = ("SteerELITE",)

    @property
    def kind(self):
        return self.variant

    def __str__(self):
        """What it is and what it needs, for people."""
        size = sum(p.numel() * p.element_size() for p in self.patcher.model.parameters()) / 2**20
        return (
            f"{self.name}: a mapper of ELITE for a UNet with {len(self.hidden)} cross-attentions to a text of width "
            f"{self.width}{self.made_for}. {size:,.0f} MB.\nTakes a picture through {self.encoder}. Whether it is the "
            "global or the local mapper its keys do not tell. For SteerELITE."
        )
