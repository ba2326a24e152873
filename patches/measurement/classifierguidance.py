"""Classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233)."""

from dataclasses import dataclass

import torch

from ..shared.energy import FLOOR, carried, open_share
from ..shared.gradient import gradients, own
from ..shared.steering import steer
from .reward import Reward


@dataclass(frozen=True)
class ClassifierGuidance(Reward):
    """D + w (s^2 / a) d log p(y | x) / dx, the mean of the clean picture given x and y for w = 1.

    The paper's classifier knows noisy latents: `Noisy` in scorer.py. One that knows clean pictures, any `Scorer` of
    log-probabilities, is asked about D, by the slope at D or through the network.
    """

    node = "SteerClassifierGuidance"

    @property
    def noisy(self):
        return getattr(self.scorer, "noisy", False)

    def traces(self, call):
        return not self.noisy and super().traces(call)

    def energy(self, denoised, call, weight):
        if not self.noisy:
            return super().energy(denoised, call, weight)
        if not self.due(call):
            return None
        a, s, spread, mask = open_share(denoised, call, self.push.mask)
        with gradients(*self.uses()):
            x = own(call.x).float().requires_grad_()
            (slope,) = torch.autograd.grad(self.scorer(x, own(call.sigma)).sum(), x)
        unit = s / (a**2 + s**2).sqrt() * spread
        return (self.push.step(slope, s**2 / a.clamp(min=FLOOR), unit, mask) * weight).to(denoised)


def apply(model, scorer, push, schedule):
    term = ClassifierGuidance(schedule, push, scorer)
    return steer(model, term) if term.noisy else carried(model, term)
