"""A scorer: whatever judges pictures, as a value on the socket STEER_SCORER."""

from typing import Protocol

import torch


class Scorer(Protocol):
    """A frozen value that is called with latents as the host stores them, [n, C, ...], and answers with numbers [n], of
    which a higher one is better. Each is judged by itself.

    patchers: the ModelPatchers whose weights it uses, to be loaded before; without any where it has none.
    For energies its answer must be differentiable in the latents where `gradients(*patchers)` is open.
    """

    def __call__(self, latents): ...


class Noisy(Protocol):
    """A classifier that was trained on noisy latents, for classifier guidance; frozen, on the same socket.

    noisy: True.  patchers: as of a `Scorer`.  x [n, C, ...] as the model works on it, with its noise; sigma [n], its
    level.  Answers with log p(y | x) [n], differentiable in x.
    """

    noisy: bool

    def __call__(self, x, sigma): ...


class TimePredictor(Protocol):
    """A classifier of noise levels, for temporal alignment; frozen, on the socket STEER_TIME_PREDICTOR.

    kind: "eps" or "flow", the noise it knows: of eps and v models, or of flow models.  levels [T]: the sigmas of its
    classes, rising.  channels: of a latent.  patchers: as of a `Scorer`.  x [n, C, ...] as a network of that kind takes
    it: x / sqrt(1 + sigma^2), or x itself.  Answers with log p(t | x) [n, T], differentiable in x.
    """

    kind: str
    levels: torch.Tensor
    channels: int

    def __call__(self, x): ...


class Features(Protocol):
    """A frozen value that looks at pictures; a scorer may be one too.

    features([n, 3, H, W] in 0..1) -> (what there is at each of N places [n, N, C], what there is at all [n, C']), both
        differentiable in the picture. Each is looked at by itself.
    patchers: the ModelPatchers whose weights it uses, to be loaded before.
    """

    patchers: tuple

    def features(self, pictures): ...
