"""Classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233)."""

from dataclasses import dataclass, field

import torch

from ..shared.decode import stored
from ..shared.energy import FLOOR, Energy, carried, open_share
from ..shared.gradient import gradients, own
from ..shared.scorer import Scorer
from ..shared.steering import steer


@dataclass(frozen=True)
class ClassifierGuidance(Energy):
    """D + w (s^2 / a) d log p(y | x) / dx, the mean of the clean picture given x and y for w = 1.

    The paper's classifier knows noisy latents: `Noisy` in scorer.py. One that knows clean pictures, any `Scorer` of
    log-probabilities, is asked about D, by the slope at D or through the network.
    """

    scorer: Scorer = field(default=None)
    node = "SteerClassifierGuidance"

    def uses(self):
        return tuple(getattr(self.scorer, "patchers", ()))

    @property
    def noisy(self):
        return getattr(self.scorer, "noisy", False)

    def traces(self, call):
        return not self.noisy and super().traces(call)

    def loss(self, D, call):
        return -self.scorer(stored(call.run.model.model, D)).float()

    def energy(self, denoised, call, weight):
        if not self.noisy:
            return super().energy(denoised, call, weight)
        if not self.due(call):
            return None
        a, s, spread, mask = open_share(denoised, call, self.push.mask)
        with gradients(*self.uses()):
            x = own(call.x).float().requires_grad_()
            (slope,) = torch.autograd.grad(self.scorer(x, own(call.sigma)).sum(), x)
        factor = s**2 / a.clamp(min=FLOOR)
        if self.push.norm == "unit":
            dims = tuple(range(1, slope.ndim))
            length = slope.square().mean(dims, keepdim=True).sqrt()
            slope, factor = slope / length.clamp(min=1e-20), s / (a**2 + s**2).sqrt() * spread
        return (slope * factor * (self.push.strength * weight) * mask).to(denoised)


def apply(model, scorer, push, schedule):
    term = ClassifierGuidance(schedule, push, scorer)
    return steer(model, term) if term.noisy else carried(model, term)
