"""Frequency-Decoupled Guidance (Sadat et al. 2025, arXiv 2506.19713)."""

from dataclasses import dataclass
from math import inf

from ..shared.steering import Term, number, steer

BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


@dataclass(frozen=True)
class FDG(Term):
    """D = D_c + sum over k of (w_k - 1) psi_k(d), k in (low, high): each band of frequencies has its own scale.

    psi_low(d) is what is left of d after `levels` halvings (the coarse end of a Laplacian pyramid, brought back to
    full size), psi_high(d) the rest. The paper splits once.
    """

    low: float = 5.0
    high: float = 10.0
    levels: int = 1
    node = "SteerFDG"
    rank = 1  # splits what APG and others leave
    needs_negative = True
    exclusive = True

    def check(self):
        number("low", self.low, -inf)
        number("high", self.high, -inf)
        number("levels", self.levels, 1, 8)

    def scale(self, w, difference, call, weight):
        return max(self._scales(call, weight), key=lambda w_k: abs(w_k - 1))

    def reshape(self, difference, positive, call, weight):
        """d' with (w - 1) d' = sum of (w_k - 1) d_k, w being what `scale` gives."""
        low, high = self._scales(call, weight)
        w = self.scale(None, difference, call, weight)
        if low == high:
            return difference
        coarse = smooth(difference, self.levels)
        return ((low - 1) * coarse + (high - 1) * (difference - coarse)) / (w - 1)

    def _scales(self, call, weight):
        """Between the sampler's cfg and the node's scales."""
        w = call.run.guider.cfg
        return tuple(w_k if weight == 1.0 else w + weight * (w_k - w) for w_k in (self.low, self.high))


def smooth(d, levels):
    """The low frequencies of d [B, C, ...], along width and height, of audio [B, C, length] along the length."""
    spatial = (-1,) if d.ndim == 3 else (-2, -1)
    for dim in spatial:
        d = smooth_along(d, dim, levels)
    return d


def smooth_along(d, dim, levels):
    """Blurs and halves d along one dimension `levels` times, and brings it back to its size."""
    from torch.nn.functional import interpolate

    d = d.movedim(dim, -1)
    line = d.reshape(-1, 1, d.shape[-1])
    sizes = []
    for _ in range(levels):
        sizes.append(line.shape[-1])
        line = interpolate(blur(line), (sizes[-1] + 1) // 2, mode="linear")
    for size in reversed(sizes):
        line = blur(interpolate(line, size, mode="linear"))
    return line.view(d.shape).movedim(-1, dim)


def blur(line):
    """Burt and Adelson's filter over the last dimension of [N, 1, length]; beyond the border lies its last value."""
    from torch.nn.functional import conv1d, pad

    return conv1d(pad(line, (2, 2), mode="replicate"), line.new_tensor(BINOMIAL).view(1, 1, -1))


def apply(model, low, high, levels, schedule):
    return steer(model, FDG(schedule, low, high, levels))
