"""Skip-Layer Guidance: away from what the network says without some of its blocks.

Published with Stable Diffusion 3.5 medium (Stability AI 2024); for video transformers as Spatiotemporal Skip Guidance
(Hyung et al. 2024, arXiv 2411.18664).
"""

from dataclasses import dataclass

from ..shared.architectures import sd3, skippable_layers, wan
from ..shared.steering import Away, Weak, steer
from . import pag

AUTO = pag.AUTO | {
    sd3.name: "double.7-9",  # Stability AI's for Stable Diffusion 3.5 medium
    wan.name: "double.9",  # what users of Wan 14B settled on
}


@dataclass(frozen=True)
class SLG(Away):
    """D + s (D_c - D_c'), where D_c' leaves out the blocks `layers`: they hand on what they were given."""

    layers: str = "auto"
    node = "SteerSLG"

    def branches(self, model):
        return (Weak("SLG", None, skippable_layers(model, self.layers, AUTO)),)


def apply(model, s, layers, schedule):
    return steer(model, SLG(schedule, s, layers))
