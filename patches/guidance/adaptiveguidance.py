"""Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487): CFG until both predictions agree, then none."""

from dataclasses import dataclass

import torch

from ..shared.steering import Term, number, steer


@dataclass(frozen=True)
class AdaptiveGuidance(Term):
    """An item whose predictions have cosine gamma >= `threshold` is sampled without its negative from then on.

    gamma is taken of the velocity v = n - D. The paper's eps is n, whose cosine begins near 1 where the noise is far
    larger than the signal (0.9999 at sigma 14.6 on an eps model), so that guidance would end before it begins.
    """

    threshold: float = 0.991
    node = "SteerAdaptiveGuidance"
    rank = 1  # after whoever sets another cfg
    exclusive = True

    @property
    def off(self):
        return super().off or self.threshold >= 1.0

    def check(self):
        number("threshold", self.threshold, -1.0, 1.0)

    def level(self, cfg, weight, run):
        done = run.state.get(self)
        if weight == 0.0 or cfg == 1.0 or done is None or run.needs_negative:
            return cfg
        run.stats.saved += sum(done)
        if all(done):
            return 1.0
        run.spared = done if any(done) else None
        return cfg

    def observe(self, call, weight):
        done = call.run.state.get(self, [False] * call.x.shape[0])
        if call.run.needs_negative or all(done):
            return
        v_c, v_u = (velocity(call, call.predictions[name]) for name in ("positive", "negative"))
        gamma = torch.nn.functional.cosine_similarity(v_c.flatten(1), v_u.flatten(1), dim=1)
        agree = (gamma >= self.threshold).tolist()
        call.run.state[self] = [was or now for was, now in zip(done, agree, strict=True)]


def velocity(call, D):
    """n - D of x = x0 + s n, or of a flow's x = (1 - s) x0 + s n up to a factor."""
    from comfy.model_sampling import CONST

    noise = (call.x - D).float()
    if isinstance(call.run.sampling, CONST):
        return noise
    return noise / call.sigma.view(-1, *[1] * (D.ndim - 1)) - D


def apply(model, threshold, schedule):
    return steer(model, AdaptiveGuidance(schedule, threshold))
