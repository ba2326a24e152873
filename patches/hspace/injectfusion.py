"""InjectFusion (Jeong et al. 2023, arXiv 2303.15403): the content of one picture in the h-space of another."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..shared.architectures import editable_layers
from ..shared.conditioning import digest
from ..shared.mask import fit
from ..shared.slerp import slerp as arc
from ..shared.source import covers, source_from
from ..shared.steering import Source, Term, blame, number, steer

TINY = 1e-12


def norm(h):
    """|h| of each item, [B, 1, 1, 1]."""
    return h.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def slerp(h, content, gamma):
    """Slerp(gamma; h, content |h| / |content|): on the sphere of h, a share gamma of the angle towards content.

    h, content: [B, C, H, W]; angle and norm of each item are taken over all of C, H, W.
    """
    return arc(h, content * (norm(h) / norm(content).clamp(min=TINY)), gamma)


MODES = {  # the paper's, then what it compares with
    "slerp": slerp,
    "lerp": lambda h, content, gamma: torch.lerp(h, content, gamma),
    "add": lambda h, content, gamma: h + gamma * content,
    "replace": lambda h, content, gamma: content,
}


@dataclass(frozen=True)
class InjectFusion(Term):
    """h' = Slerp(gamma; h, h_content), for the positive and the negative alike.

    The content picture runs beside the target, at its own latent of this noise level, so h_content is of the same step.
    With a mask m of 0 to 1, h' = (1 - m) h + Slerp(gamma; m h, m h_content).
    """

    source: Source = None
    gamma: float = 0.3
    mode: str = "slerp"
    layers: str = "middle"
    region: str = ""  # tells masks apart
    mask: torch.Tensor = field(default=None, compare=False, repr=False)
    node = "SteerInjectFusion"
    edits = True

    def check(self):
        number("gamma", self.gamma, 0.0, 1.0)
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise ValueError("the mask is empty, so nothing would be injected; paint where the content goes.")

    @property
    def off(self):
        return super().off or self.gamma == 0.0

    def prepare(self, run):
        covers(self.source, run)
        if self.mask is not None:
            fit(self.mask, run.shape)

    def branches(self, model):
        return (self.source,)

    def features(self, model):
        return [(layer, self.inject) for layer in editable_layers(model, self.layers)]

    def inject(self, h, source, call, weight):
        x, content, mix = h.float(), source.float(), MODES[self.mode]
        if self.mask is None:
            return mix(x, content, self.gamma * weight).to(h)
        m = F.interpolate(fit(self.mask, call.run.shape).to(x), x.shape[2:], mode="area")
        return ((1 - m) * x + mix(m * x, m * content, self.gamma * weight)).to(h)


def apply(model, content, gamma, schedule, mode="slerp", layers="middle", mask=None, source=None):
    with blame(InjectFusion):
        branch = source_from(model, content, source)
    region = "" if mask is None else digest(mask)
    term = InjectFusion(schedule, branch, gamma, mode, layers, region, mask)
    return steer(model, term)
