"""A scorer: whatever judges pictures, as a value on the socket STEER_SCORER."""

from typing import Protocol


class Scorer(Protocol):
    """A frozen value that is called with latents as the host stores them, [n, C, ...], and answers with numbers [n], of
    which a higher one is better. Each is judged by itself."""

    def __call__(self, latents): ...
