"""Pictures that a network draws while it is trained.

In a noisy portrait the right face shows already, all but at the highest noise; a network that is trained on these alone
never learns to mend a face that goes wrong while it draws (exposure bias; Ning et al. 2023, 2301.11706). So a share of
each batch are drawings under way by the network itself, and what is not the portrait in them counts as noise.
"""

from typing import NamedTuple

import torch

from .portrait import Portrait

COUNT = 64  # drawings under way
PACE = 50, 150  # times from one step to the next
LAST = 100  # time below which a face is settled


class Drawing(NamedTuple):
    """A picture at the time t, `latent` [4, 16, 16] with its noise, on its way to the portrait at place `at`, which is
    asked for by the row of a text and the reference `looked` at."""

    at: int
    row: torch.Tensor
    looked: Portrait
    latent: torch.Tensor
    t: int


class Drawings:
    """example() -> (place of a portrait, its latent, row of the text, reference); sigmas: the model's, for each time.

    The first are noisy portraits of any time, so that not all are at the same.
    """

    def __init__(self, example, sigmas, rng):
        self.example, self.sigmas, self.rng = example, sigmas, rng
        self.under_way = [self.begin(rng.randrange(LAST, 1000)) for _ in range(COUNT)]

    def begin(self, t=999):
        at, z, row, looked = self.example()
        return Drawing(at, row, looked, z + self.sigmas[t] * torch.randn_like(z), t)

    def some(self, count):
        """{number: Drawing}"""
        return {n: self.under_way[n] for n in self.rng.sample(range(COUNT), count)}

    def go_on(self, number, eps):
        """A step of Euler's method along the noise eps [4, 16, 16]; what is done makes room for another."""
        one = self.under_way[number]
        t = one.t - self.rng.randint(*PACE)
        if t < LAST:
            self.under_way[number] = self.begin()
        else:
            later = one.latent + (self.sigmas[t] - self.sigmas[one.t]) * eps
            self.under_way[number] = one._replace(latent=later, t=t)
