"""Measurement operators y = A(x): what is known of a picture, or of a latent, that shall be made."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..guidance.sag import blur
from ..shared.conditioning import digest
from ..shared.steering import number

KINDS = ("downsample", "mask", "grayscale", "blur", "Fourier magnitude", "random projection")
GREY = (0.299, 0.587, 0.114)
PATCH = 8  # side of the blocks that are projected


@dataclass(frozen=True)
class Operator:
    """A(x) of x [n, C, H, W], differentiable, each item by itself; `after` comes first.

    downsample         means over `factor` x `factor`
    mask               x where the mask is 0.5 or more, 0 elsewhere
    grayscale          one channel, by the weights of BT.601
    blur               with a Gaussian of `sigma`, mirrored at the borders
    Fourier magnitude  |F x| per channel, orthonormal: phase retrieval
    random projection  each block of 8 x 8 onto `share` of its dimensions, random and orthonormal
    """

    kind: str
    factor: int = 4
    sigma: float = 2.0
    share: float = 0.25
    seed: int = 0
    mask: torch.Tensor | None = field(default=None, compare=False, repr=False)  # [b, h, w]
    masked: str = ""  # tells masks apart
    after: Any = None  # an Operator

    def __call__(self, x):
        x = x if self.after is None else self.after(x)
        if self.kind == "downsample":
            return F.avg_pool2d(self._whole(x, self.factor), self.factor)
        if self.kind == "mask":
            return x * self._mask(x)
        if self.kind == "grayscale":
            return (x * self._grey(x)).sum(1, keepdim=True)
        if self.kind == "blur":
            return blur(x, self.sigma)
        if self.kind == "Fourier magnitude":
            return torch.fft.fft2(x, norm="ortho").abs()
        return self._rows(x) @ F.unfold(self._whole(x, PATCH), PATCH, stride=PATCH)

    def pinv(self, y, like):
        """The smallest x with A x = y, in the shape of `like` [n, C, H, W]; ValueError where none is known."""
        if self.after is not None:
            inner = self.after(like)
            return self.after.pinv(replace(self, after=None).pinv(y, inner), like)
        if self.kind == "downsample":
            return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)
        if self.kind == "mask":
            return y * self._mask(like)
        if self.kind == "grayscale":
            weights = self._grey(like)
            return y * weights / weights.square().sum()
        if self.kind == "random projection":
            return F.fold(self._rows(like).mT @ y, like.shape[-2:], PATCH, stride=PATCH)
        raise ValueError(f"{self.kind} has no inverse to project with; set mode to soft.")

    def _mask(self, x):
        m = self.mask.to(x)[:, None]
        return (F.interpolate(m, x.shape[-2:], mode="area") >= 0.5).to(x)

    def _grey(self, x):
        if x.shape[1] != 3:
            raise ValueError(f"grayscale needs pictures with 3 channels, and this has {x.shape[1]}; give it an image.")
        return torch.tensor(GREY).to(x).view(1, 3, 1, 1)

    def _whole(self, x, n):
        if x.ndim != 4 or x.shape[-2] % n or x.shape[-1] % n:
            raise ValueError(f"{self.kind} takes sizes that divide by {n}, and this is {x.shape[-1]}x{x.shape[-2]}.")
        return x

    def _rows(self, x):
        size = x.shape[1] * PATCH * PATCH
        square = torch.randn(size, size, generator=torch.Generator().manual_seed(self.seed))
        return torch.linalg.qr(square)[0][: max(1, round(size * self.share))].to(x)


def operator(kind, factor=4, sigma=2.0, share=0.25, seed=0, mask=None, after=None):
    """An `Operator`; ValueError for numbers that make no sense. mask: MASK [b, h, w], what is known."""
    if kind not in KINDS:
        raise ValueError(f"SteerOperator: kind {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    number("SteerOperator: factor", factor, 2)
    number("SteerOperator: sigma", sigma, 0.01)
    number("SteerOperator: share", share, 0.0, 1.0)
    if (kind == "mask") != (mask is not None):
        raise ValueError("SteerOperator: wire a mask for the kind mask, which is 1 where the picture is known.")
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
    return Operator(kind, factor, sigma, share, seed, mask, "" if mask is None else digest(mask), after)
