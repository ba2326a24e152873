"""beta-CFG (Malarz et al. 2025, arXiv 2502.10574): guidance normalised in size and weighted over time."""

from dataclasses import dataclass
from math import exp, lgamma

from ..shared.steering import Term, number, steer
from .apg import norm

PAPER = 4 * 64 * 64  # numbers in a latent of the paper's experiments, Stable Diffusion 1.5 at 512 px


@dataclass(frozen=True)
class BetaCFG(Term):
    """eps = eps_u + w B(t; a, b) (eps_c - eps_u) / |eps_c - eps_u|^gamma, B the density of the beta distribution.

    t runs from 0 at the first step to 1 at the last, so that for a, b > 1 these two are not guided at all: they are the
    negative's. The size of the difference of eps, and of the velocity on flow models, is |D_c - D_u| / sigma. It grows
    with the root of the latent; here it is measured as on a latent of the paper's size, so that w means the same on
    every size and model.

    keep_conditional: the positive in place of the negative, D = D_c + (w - 1) B d / |.|^gamma.
    """

    a: float = 2.0
    b: float = 2.0
    gamma: float = 1.0
    keep_conditional: bool = False
    node = "SteerBetaCFG"
    exclusive = True

    def check(self):
        number("a", self.a, 1.0, 100.0)
        number("b", self.b, 1.0, 100.0)
        number("gamma", self.gamma, high=4.0)

    def scale(self, w, difference, call, weight):
        strength = self._density(call)
        if self.gamma:
            sigma = call.sigma.view(-1, *[1] * (difference.ndim - 1))
            size = norm(difference) / sigma * (PAPER / difference[0].numel()) ** 0.5
            strength = strength / size.clamp(min=1e-6) ** self.gamma
        scale = 1 + (w - 1) * strength if self.keep_conditional else w * strength
        return scale if weight == 1.0 else w + weight * (scale - w)

    def _density(self, call):
        """B(t; a, b) at the step of this evaluation, a scalar on the device of the model."""
        steps = len(call.sigmas) - 1
        t = (call.sigmas[:-1] - call.sigma[0]).abs().argmin() / max(steps - 1, 1)
        normal = exp(lgamma(self.a + self.b) - lgamma(self.a) - lgamma(self.b))
        return normal * t ** (self.a - 1) * (1 - t) ** (self.b - 1)


def apply(model, a, b, gamma, keep_conditional, schedule):
    return steer(model, BetaCFG(schedule, a, b, gamma, keep_conditional))
