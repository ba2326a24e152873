"""A guider as samplers know it, with another answer to what D is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Guider:
    """All of `guider`, but called as `predict`(x, sigma, **options) -> D, and with these `methods` in place of its."""

    guider: Any
    predict: Callable
    methods: dict = field(default_factory=dict)

    def __getattr__(self, name):
        return self.methods[name] if name in self.methods else getattr(self.guider, name)

    def __call__(self, x, sigma, **options):
        return self.predict(x, sigma, **options)
