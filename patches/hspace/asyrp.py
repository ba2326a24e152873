"""Asyrp (Kwon et al. 2022, arXiv 2210.10960): a direction added in h-space."""

from dataclasses import dataclass, field

from ..shared.steering import Term, blame, number, steer
from ..shared.trajectory import fingerprint
from .direction import Direction


@dataclass(frozen=True)
class Asyrp(Term):
    """h' = h + s dh(sigma), for the positive and the negative alike; several add up."""

    s: float = 1.0
    name: str = ""  # tells directions apart
    direction: Direction = field(default=None, compare=False, repr=False)
    node = "SteerAsyrp"
    edits = True

    def check(self):
        number("strength", self.s, -1000.0, 1000.0)

    @property
    def off(self):
        return super().off or self.s == 0.0

    def prepare(self, run):
        mine, its = self.direction.shape, tuple(run.shape[1:])
        if mine != its:
            raise ValueError(
                f"the direction was found on latents of size {mine}, the sampler's is {its} (channels, height, width); "
                "find it at the size that is sampled."
            )

    def features(self, model):
        return [(self.direction.layer, self.move)]

    def move(self, h, source, call, weight):
        return h + (self.s * weight * self.direction.at(call.level)).to(h)


def apply(model, direction, s, schedule):
    with blame(Asyrp):
        difference = direction.model.difference(fingerprint(model))
        if difference:
            raise ValueError(f"the direction is of another model: {difference}; find it with this model.")
    return steer(model, Asyrp(schedule, s, f"{id(direction):x}", direction))
