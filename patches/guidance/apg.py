"""Adaptive Projected Guidance (Sadat et al. 2024, arXiv 2410.02416)."""

import math
from dataclasses import dataclass

from ..shared.steering import Term, number, steer


@dataclass(frozen=True)
class APG(Term):
    """D = D_c + (w - 1) (d_perp + eta d_par), on clean estimates, where the paper finds it works best.

    eta: share of the part of d parallel to D_c; 1 keeps it whole, 0 (paper) takes the oversaturation away.
    r: largest norm of d over all non-batch dimensions; 0 for no limit.
    beta: momentum of d over the steps; negative values turn against directions already taken, 0 is none.
    """

    eta: float = 0.0
    r: float = 15.0
    beta: float = -0.5
    node = "SteerAPG"
    exclusive = True

    def check(self):
        number("eta", self.eta, -math.inf)
        number("norm_threshold", self.r)
        number("momentum", self.beta, -math.inf)

    def reshape(self, difference, positive, call, weight):
        d = difference
        if self.beta != 0.0:
            d = self._momentum(d, call)
        if self.r > 0.0:
            d = d * (self.r / norm(d).clamp(min=self.r))
        parallel = project(d, positive)
        d = (d - parallel) + self.eta * parallel
        return d if weight == 1.0 else difference.lerp(d, weight)

    def _momentum(self, d, call):
        """m <- d + beta m, once per noise level: a second evaluation at the same level replaces the first."""
        level = call.level
        last, before, now = call.run.state.get(self, (level, None, None))
        if level < last:
            before = now
        m = d if before is None else d + self.beta * before
        call.run.state[self] = (level, before, m)
        return m


def norm(d):
    """L2 norm over all non-batch dimensions, shape [B, 1, ...]."""
    return d.flatten(1).norm(dim=1).view(-1, *[1] * (d.ndim - 1))


def project(d, onto):
    """The part of `d` parallel to `onto`, both [B, ...], item by item; 0 where `onto` is 0."""
    dims = tuple(range(1, d.ndim))
    along = (d * onto).sum(dims, keepdim=True) / (onto * onto).sum(dims, keepdim=True).clamp(min=1e-12)
    return along * onto


def apply(model, eta, r, beta, schedule):
    return steer(model, APG(schedule, eta, r, beta))
