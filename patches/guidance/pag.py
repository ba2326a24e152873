"""Perturbed-Attention Guidance (Ahn et al. 2024, arXiv 2403.17377)."""

from dataclasses import dataclass

from ..shared.architectures import self_attention_layers, unet
from ..shared.steering import Term, Weak, number, steer

# the paper's choice for Stable Diffusion
AUTO = {unet.name: "middle"}


def identity_attention(call):
    """Self-attention with the identity as its map, softmax(QK^T) -> I: the output is V."""
    return call.v


@dataclass(frozen=True)
class PAG(Term):
    """D + s (D_c - D_c^), where D_c^ has identity self-attention in `layers`; the paper's guidance, in D."""

    s: float = 3.0
    layers: str = "auto"
    node = "SteerPAG"

    def check(self):
        number("scale", self.s)

    @property
    def off(self):
        return super().off or self.s == 0.0

    def branches(self, model):
        return (Weak("PAG", identity_attention, self_attention_layers(model, self.layers, AUTO)),)

    def add(self, call, weak, weight):
        return (call.predictions["positive"] - weak[0]) * (self.s * weight)


def apply(model, s, layers, schedule):
    return steer(model, PAG(schedule, s, layers))
