"""A guider as samplers know it, with another answer to what D is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Guider:
    """All of `guider`, but called as `predict`(x, sigma, **options) -> D."""

    guider: Any
    predict: Callable

    def __getattr__(self, name):
        return getattr(self.guider, name)

    def __call__(self, x, sigma, **options):
        return self.predict(x, sigma, **options)
