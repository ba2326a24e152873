"""Dynamic CFG via online feedback (Papalampidi et al. 2025, arXiv 2509.16131), with scorers that need no weights."""

from dataclasses import dataclass

import torch

from ..shared.steering import Term, number, steer


@dataclass(frozen=True)
class FeedbackCFG(Term):
    """w = argmax over candidates of alignment(w) - fidelity * distance(w), greedily in each step, item by item.

    The paper scores D_w = D_u + w d with trained evaluators of noisy latents. These two need none:
        alignment(w)  cosine of D_w and d: how much of the clean estimate is what the prompt adds
        distance(w)   |log(std D_w / std D_c)|: how far its contrast is from that of an unguided estimate
    Both are functions of inner products, so no candidate is ever built.
    """

    low: float = 1.0
    high: float = 7.5
    count: int = 14
    fidelity: float = 0.5
    node = "SteerFeedbackCFG"
    needs_negative = True
    exclusive = True

    def check(self):
        number("low", self.low)
        number("high", self.high, self.low)
        number("candidates", self.count, 2)
        number("fidelity", self.fidelity)

    def scale(self, w, difference, call, weight):
        candidates = torch.linspace(self.low, self.high, self.count, device=difference.device)
        D_c = call.predictions["positive"]
        best = candidates[self.score(D_c, difference, candidates).argmax(1)]
        best = best.view(-1, *[1] * (difference.ndim - 1))
        return w + (best - w) * weight

    def score(self, D_c, d, w):
        """[B, K] of D_c, d [B, ...] and candidates w [K]."""
        D_u, d = centred(D_c - d), centred(d)
        uu, ud, dd = ((a * b).sum(1, keepdim=True) for a, b in ((D_u, D_u), (D_u, d), (d, d)))

        def square(w):  # of the norm of D_w
            return (uu + 2 * w * ud + w * w * dd).clamp(min=1e-12)

        alignment = (ud + w * dd) / (square(w) * dd).clamp(min=1e-12).sqrt()
        distance = (square(w) / square(torch.ones_like(w))).log().abs() / 2
        return alignment - self.fidelity * distance


def centred(D):
    """[B, ...] -> [B, N] without its mean."""
    flat = D.flatten(1).float()
    return flat - flat.mean(1, keepdim=True)


def apply(model, low, high, count, fidelity, schedule):
    return steer(model, FeedbackCFG(schedule, low, high, count, fidelity))
