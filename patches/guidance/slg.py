"""Skip-Layer Guidance: away from what the network says without some of its blocks.

Published with Stable Diffusion 3.5 medium (Stability AI 2024); for video transformers as Spatiotemporal Skip Guidance
(Hyung et al. 2024, arXiv 2411.18664).
"""

from dataclasses import dataclass

from ..shared.architectures import flux, hunyuan, lumina, qwen, sd3, skippable_layers, unet, wan
from ..shared.steering import Term, Weak, number, steer

AUTO = {
    sd3.name: "double.7-9",  # Stability AI's for Stable Diffusion 3.5 medium
    wan.name: "double.9",  # what users of Wan 14B settled on
    # No published choice: half depth, as for PAG.
    unet.name: "middle",
    flux.name: "50%",
    lumina.name: "50%",
    qwen.name: "50%",
    hunyuan.name: "50%",
}


@dataclass(frozen=True)
class SLG(Term):
    """D + s (D_c - D_c'), where D_c' leaves out the blocks `layers`: they hand on what they were given."""

    s: float = 3.0
    layers: str = "auto"
    node = "SteerSLG"

    def check(self):
        number("scale", self.s)

    @property
    def off(self):
        return super().off or self.s == 0.0

    def branches(self, model):
        return (Weak("SLG", None, skippable_layers(model, self.layers, AUTO)),)

    def add(self, call, weak, weight):
        return (call.predictions["positive"] - weak[0]) * (self.s * weight)


def apply(model, s, layers, schedule):
    return steer(model, SLG(schedule, s, layers))
