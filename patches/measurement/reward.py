"""Guidance by a reward: whatever scores pictures moves the clean estimate towards a higher score."""

from dataclasses import dataclass, field

from ..shared.decode import stored
from ..shared.energy import Energy, carried
from ..shared.scorer import Scorer


@dataclass(frozen=True)
class Reward(Energy):
    """E = -score of the clean estimate, as Universal Guidance (arXiv 2302.07121) and FreeDoM (2303.09833) have it."""

    scorer: Scorer = field(default=None)
    node = "SteerReward"

    def uses(self):
        return tuple(getattr(self.scorer, "patchers", ()))

    def loss(self, D, call):
        return -self.scorer(stored(call.run.model.model, D)).float()


def apply(model, scorer, push, schedule):
    return carried(model, Reward(schedule, push, scorer))
