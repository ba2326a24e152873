"""Smoothed Energy Guidance (Hong 2024, arXiv 2408.00760)."""

import math
from dataclasses import dataclass, replace

import torch

from ..shared.architectures import self_attention_layers
from ..shared.steering import Away, Weak, number, steer
from .pag import AUTO

MEAN = 1000.0  # from this blur on, in tokens, queries are their mean: no picture is so large that it matters


@dataclass(frozen=True)
class BlurredQueries:
    """Self-attention whose queries are blurred over the picture, which is the same as blurring the attention map along
    them (section 4.3); keys and values stay.

    sigma: standard deviation of the Gaussian in tokens; from `MEAN` on the mean over the picture, the paper's infinity.
    """

    sigma: float

    def __call__(self, call):
        first, last = call.image
        queries = call.q[:, first:last]
        if self.sigma >= MEAN:
            blurred = queries.mean(1, keepdim=True).expand_as(queries)
        else:
            t, h, w = call.grid()
            q = queries.reshape(-1, h, w, queries.shape[-1])
            q = torch.einsum("ij,bjwd->biwd", gaussian(h, self.sigma, q), q)
            blurred = torch.einsum("ij,bhjd->bhid", gaussian(w, self.sigma, q), q).reshape(queries.shape)
        if blurred.shape == call.q.shape:
            return replace(call, q=blurred)
        q = call.q.clone()
        q[:, first:last] = blurred
        return replace(call, q=q)


def gaussian(n, sigma, like):
    """Gaussian blur of n values as a matrix [n, n], mirrored at the ends without repeating them; any sigma > 0."""
    period = max(2 * n - 2, 1)
    reach = math.ceil(4 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=like.device)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    place = (torch.arange(n, device=like.device)[:, None] + offsets) % period
    place = torch.where(place < n, place, period - place)
    matrix = torch.zeros(n, n, device=like.device).scatter_add_(1, place, (weights / weights.sum()).expand(n, -1))
    return matrix.to(like.dtype)


@dataclass(frozen=True)
class SEG(Away):
    """D + s (D_c - D_c~), where D_c~ attends with blurred queries in `layers`; the paper's guidance, in D."""

    sigma: float = 100.0
    layers: str = "auto"
    node = "SteerSEG"

    def check(self):
        super().check()
        number("blur_sigma", self.sigma)

    @property
    def off(self):
        return super().off or self.sigma == 0.0

    def branches(self, model):
        blur = BlurredQueries(min(self.sigma, MEAN))
        name = f"SEG {self.sigma:g}" if self.sigma < MEAN else "SEG mean"
        return (Weak(name, blur, self_attention_layers(model, self.layers, AUTO)),)


def apply(model, s, sigma, layers, schedule):
    return steer(model, SEG(schedule, s, sigma, layers))
