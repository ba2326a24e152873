"""Temporal Alignment Guidance (Park et al. 2025, arXiv 2510.11057), which the paper abbreviates TAG."""

from dataclasses import dataclass, field

import torch

from ..shared.energy import FLOOR, Energy, open_share
from ..shared.euler import next_sigma, only_euler, signal
from ..shared.gradient import gradients, own
from ..shared.scorer import TimePredictor
from ..shared.steering import in_order, steer

FORMS = ("score", "sample")


@dataclass(frozen=True)
class TemporalAlignment(Energy):
    """The score plus w d log p(t | x) / dx, with t the level at which the network is asked (definition 3.2).

    "score"   D' = D + w (s^2 / a) d log p(t | x) / dx, the clean estimate of that score (Tweedie).
    "sample"  the same D', but the noise of D in the next step, with r = s' / s:
                  x' = a' D' + s' (x - a D) / s,  which is the Euler step of  D + (D' - D) / (1 - r a / a').
              That is x + w s^2 d log p(t | x) / dx in place of x in DDIM's step (algorithm 1), whose schedule
              w (1 - abar) is w s^2 in x = a x0 + s n.
    """

    predictor: TimePredictor = field(default=None)
    form: str = "score"
    node = "SteerTemporalAlignment"

    def check(self):
        super().check()
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is unknown; choose one of {', '.join(FORMS)}.")

    def uses(self):
        return tuple(getattr(self.predictor, "patchers", ()))

    def prepare(self, run):
        super().prepare(run)
        predictor = self.predictor
        kind = "eps" if signal(run.sampling, 0.5) == 1.0 else "flow"
        if predictor.kind != kind:
            raise ValueError(
                f"the time predictor knows the noise of {predictor.kind} models, and this is {kind}; take one that was "
                "trained for this model."
            )
        if len(run.shape) != 4 or run.shape[1] != predictor.channels:
            raise ValueError(
                f"the time predictor knows pictures with {predictor.channels} channels, and these latents are "
                f"{tuple(run.shape[1:])}; take one that was trained for this model."
            )
        if self.form == "sample":
            if any(term.node == "SteerCFGPP" for term in in_order(run.guider.model_options)):
                raise ValueError('SteerCFGPP keeps a step\'s noise too; set form to "score", which is this one then.')
            only_euler(run, remedy='does not take the step of form "sample"; use euler or ddim, or "score".')

    def energy(self, denoised, call, weight):
        if not self.due(call):
            return None
        a, s, _, mask = open_share(denoised, call, self.push.mask)
        with gradients(*self.uses()):
            x = own(call.x).float().requires_grad_()
            (slope,) = torch.autograd.grad(aligned(self.predictor, x, own(call.sigma), call.run.sampling).sum(), x)
        shift = self.push.step(slope, s**2 / a.clamp(min=FLOOR), None, mask) * weight
        if self.form == "sample":
            s_next = next_sigma(call)
            shift = shift / (1 - s_next * a / (s * signal(call.run.sampling, s_next)))
        return shift.to(denoised)


def aligned(predictor, x, sigma, sampling):
    """log p(t | x) [n] of x [n, C, ...] as the model works on it, t the level sigma [n], between the predictor's."""
    known = told(predictor, x, sigma, sampling)
    at = position(predictor.levels, sigma)
    low = at.long().clamp(max=known.shape[1] - 2)
    pair = torch.stack([low, low + 1], 1)
    return torch.lerp(*known.gather(1, pair).T, at - low)


def told(predictor, x, sigma, sampling):
    """log p of all levels [n, T]."""
    return predictor(sampling.calculate_input(sigma, x)).float()


def position(levels, sigma):
    """Where sigma [n] lies among the levels [T], as an index with a fraction; the ends for what lies beyond."""
    levels = own(levels).to(sigma)
    sigma = sigma.clamp(levels[0], levels[-1])
    high = torch.searchsorted(levels, sigma).clamp(1, len(levels) - 1)
    return high - 1 + (sigma - levels[high - 1]) / (levels[high] - levels[high - 1])


def apply(model, predictor, form, push, schedule):
    return steer(model, TemporalAlignment(schedule, push, predictor, form))
