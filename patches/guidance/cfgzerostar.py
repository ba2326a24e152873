"""CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): optimised scale and zero-init."""

from dataclasses import dataclass

from ..shared.steering import Term, number, steer
from .tcfg import dot


@dataclass(frozen=True)
class CFGZeroStar(Term):
    """v = s v_u + w (v_c - s v_u), s = <v_c, v_u> / |v_u|^2 per item, and v = 0 in the first steps (algorithm 1).

    On clean estimates D = x - sigma v: the negative becomes D_u' = x - s (x - D_u). Where v is 0, D is x, and the
    network is not asked. eps takes the place of v on eps models.

    zero_init: share of the steps with v = 0, rounded, at least one step; 0 for none.
    """

    zero_init: float = 0.04
    node = "SteerCFGZeroStar"
    rank = -2  # corrects the predictions; the others reshape what it leaves
    exclusive = True

    def check(self):
        number("zero_init", self.zero_init, high=1.0)

    def instead(self, call, weight):
        """x above the noise level at which the first share of the steps ends, also in between (dpm_2, heun)."""
        steps = len(call.run.sigmas) - 1
        zeroed = max(1, round(self.zero_init * steps)) if self.zero_init else 0
        if zeroed == 0 or call.run.state.get(self):
            return None
        end, last = (float(call.run.sigmas[i]) for i in (zeroed, -1))
        begun = abs(call.level - last) <= abs(end - last)  # in either direction of the sigmas
        call.run.state[self] = begun  # asks the device no more
        return None if begun else call.x

    def reshape(self, difference, positive, call, weight):
        v_c = call.x - positive
        v_u = v_c + difference
        s = dot(v_c, v_u) / dot(v_u, v_u).clamp(min=1e-12)
        return difference.lerp(s * v_u - v_c, weight)


def apply(model, zero_init, schedule):
    return steer(model, CFGZeroStar(schedule, zero_init))
