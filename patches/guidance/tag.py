"""Tangential Amplifying Guidance (Cho et al. 2025, arXiv 2510.04533)."""

from dataclasses import dataclass

from ..shared.steering import Term, number, steer
from .apg import project


@dataclass(frozen=True)
class TAG(Term):
    """x' = x + P d + eta (I - P) d with d the step of the solver, P the projector onto x (algorithm 1).

    An Euler step is d = (1 - r) (D - x), and (I - P) x = 0. So eta acts on the tangential part of D alone:
        D* = D + (eta - 1) (I - P) D.
    That holds for x and noise in any scaling (VE, VP, flow), since these differ by multiples of x.

    gain: eta - 1.
    """

    gain: float = 0.15
    node = "SteerTAG"
    rank = 1  # amplifies the step that CFG++ made
    exclusive = True

    def check(self):
        number("scale", self.gain)

    @property
    def off(self):
        return super().off or self.gain == 0.0

    def step(self, denoised, call, weight):
        def amplified(D):
            return D + self.gain * weight * (D - project(D, call.x))

        if call.run.renoise is not None:  # the step is made of D and this, and linear in both
            call.run.renoise = amplified(call.run.renoise)
        return amplified(denoised)


def apply(model, scale, schedule):
    return steer(model, TAG(schedule, scale))
