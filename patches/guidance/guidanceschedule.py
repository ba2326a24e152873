"""The guidance weight as a function of the noise level.

limited interval     Kynkaanniemi et al. 2024, arXiv 2404.07724
stage-wise           Jin et al. 2025, arXiv 2509.22007
"""

from dataclasses import dataclass, replace
from math import pi, sin

from ..shared.steering import Term, blame, number, steer

POINTS = 257  # of a curve
# the paper's interval for SDXL, as noise over signal: guidance where s_lo < s <= s_hi
S_LO, S_HI = 0.28, 5.42
PRESETS = ("custom", "limited interval", "weak-strong-weak", "stage-wise")
SHAPES = {
    "weak-strong-weak": lambda p: sin(p * pi) ** 2,
    "stage-wise": lambda p: 1 - abs(2 * p - 1),
}


@dataclass(frozen=True)
class GuidanceSchedule(Term):
    """w(s) = low + (high - low) weight(s), in place of the sampler's cfg; outside the window the weight is 0.

    Where w is 1 the host predicts no negative.
    """

    low: float = 1.0
    high: float = 7.5
    node = "SteerGuidanceSchedule"

    def check(self):
        number("low", self.low)
        number("high", self.high)

    def prepare(self, run):
        if any(isinstance(term, GuidanceSchedule) for term, _, _ in run.terms):
            raise ValueError("the model carries it twice, and each sets the cfg of every step; keep one.")

    def level(self, cfg, weight, run):
        return self.low + (self.high - self.low) * weight


def shaped(schedule, preset, model_sampling):
    """The `Schedule` of a preset, inside the window and times the curve of `schedule`."""
    if preset not in PRESETS:
        raise ValueError(f'preset "{preset}" must be one of {", ".join(PRESETS)}.')
    if preset == "limited interval":
        start, end = (percent(model_sampling, s) for s in (S_HI, S_LO))
        start, end = max(start, schedule.start_percent), min(end, schedule.end_percent)
        return replace(schedule, start_percent=start, end_percent=end)
    if preset in SHAPES:
        grid = [i / (POINTS - 1) for i in range(POINTS)]
        return replace(schedule, curve=tuple(SHAPES[preset](p) * _at(schedule.curve, p) for p in grid))
    return schedule


def percent(model_sampling, s):
    """Where in the sampling range the ratio of noise to signal is `s`, whatever the model's own sigma means."""
    from comfy.model_sampling import CONST

    sigma = s / (1 + s) if isinstance(model_sampling, CONST) else s  # flow: x = (1 - sigma) x0 + sigma n
    first, last = 0.0, 1.0
    for _ in range(50):
        middle = (first + last) / 2
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            first = middle
        else:
            last = middle
    return last


def _at(curve, p):
    if curve is None:
        return 1.0
    position = p * (len(curve) - 1)
    i = min(int(position), len(curve) - 2)
    return curve[i] + (curve[i + 1] - curve[i]) * (position - i)


def apply(model, low, high, preset, schedule):
    with blame(GuidanceSchedule):
        schedule = shaped(schedule, preset, model.get_model_object("model_sampling"))
    return steer(model, GuidanceSchedule(schedule, low, high))
