"""Dynamic CFG via online feedback (Papalampidi et al. 2025, arXiv 2509.16131)."""

from dataclasses import dataclass

import torch

from ..shared.scorer import Scorer
from ..shared.steering import Term, number, steer


@dataclass(frozen=True)
class FeedbackCFG(Term):
    """w = argmax over candidates of alignment(w) - fidelity * distance(w), greedily in each step, item by item.

    The paper scores D_w = D_u + w d with trained evaluators of noisy latents. A `scorer` of pictures is asked for the
    alignment of each D_w; without one there are two that need no weights:
        alignment(w)  cosine of D_w and d: how much of the clean estimate is what the prompt adds
        distance(w)   |log(std D_w / std D_c)|: how far its contrast is from that of an unguided estimate
    Both are functions of inner products, so without a scorer no candidate is ever built.
    """

    low: float = 1.0
    high: float = 7.5
    count: int = 14
    fidelity: float = 0.5
    scorer: Scorer | None = None
    node = "SteerFeedbackCFG"
    needs_negative = True
    exclusive = True

    def check(self):
        number("low", self.low)
        number("high", self.high, self.low)
        number("candidates", self.count, 2)
        number("fidelity", self.fidelity)

    def uses(self):
        return tuple(getattr(self.scorer, "patchers", ()))

    def scale(self, w, difference, call, weight):
        candidates = torch.linspace(self.low, self.high, self.count, device=difference.device)
        D_c = call.predictions["positive"]
        alignment, distance = scores(D_c, difference, candidates)
        if self.scorer is not None:
            alignment = self.judged(D_c - difference, difference, candidates, call.run.model.model)
        best = candidates[(alignment - self.fidelity * distance).argmax(1)]
        best = best.view(-1, *[1] * (difference.ndim - 1))
        return w + (best - w) * weight

    def judged(self, D_u, d, w, model):
        """The scorer's answers, [B, K]; one candidate of the whole batch at a time."""
        answers = [self.scorer(model.process_latent_out(D_u + each * d)) for each in w]
        return torch.stack([each.to(d.device, torch.float32) for each in answers], 1)


def scores(D_c, d, w):
    """alignment and distance, [B, K], of D_c, d [B, ...] and candidates w [K]."""
    D_u, d = centred(D_c - d), centred(d)
    uu, ud, dd = ((a * b).sum(1, keepdim=True) for a, b in ((D_u, D_u), (D_u, d), (d, d)))

    def square(w):  # of the norm of D_w
        return (uu + 2 * w * ud + w * w * dd).clamp(min=1e-12)

    alignment = (ud + w * dd) / (square(w) * dd).clamp(min=1e-12).sqrt()
    return alignment, (square(w) / square(torch.ones_like(w))).log().abs() / 2


def centred(D):
    """[B, ...] -> [B, N] without its mean."""
    flat = D.flatten(1).float()
    return flat - flat.mean(1, keepdim=True)


def apply(model, low, high, count, fidelity, schedule, scorer=None):
    return steer(model, FeedbackCFG(schedule, low, high, count, fidelity, scorer))
