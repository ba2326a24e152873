"""Self-Attention Guidance (Hong et al. 2022, arXiv 2210.00939)."""

from dataclasses import dataclass

import torch

from ..shared.architectures import adapter_of, unet
from ..shared.attention import Attention
from ..shared.euler import signal
from ..shared.layers import Layer
from ..shared.steering import Term, number, steer
from .seg import gaussian

THRESHOLD = 1.0  # of the attention that a place receives, where 1 is its even share (the paper's psi)
MIDDLE = Layer("middle", 0)


@dataclass(frozen=True)
class SAG(Term):
    """D + s (D^ - D(x^)): away from the prediction on an input that lost its detail where the network looks most.

    D is the negative prediction, or the positive where the sampler runs no negative. M marks the places whose summed
    self-attention in the middle block exceeds `THRESHOLD`; D^ is D blurred there, D^ = M blur(D) + (1 - M) D, and x^ is
    D^ under the noise of x (algorithm 1 of the paper, in D; the host's own node does the same for eps models).
    """

    s: float = 0.5
    sigma: float = 2.0
    node = "SteerSAG"
    again = True

    def check(self):
        number("scale", self.s)
        number("blur_sigma", self.sigma)

    @property
    def off(self):
        return super().off or self.s == 0.0 or self.sigma == 0.0

    def attention(self, model):
        adapter = adapter_of(model.model)
        layers = {block.layer for block in adapter.blocks(model.get_model_object("diffusion_model")) if block.attends}
        if adapter is not unet or MIDDLE not in layers:
            raise ValueError(
                f"is defined by the self-attention of a UNet's middle block, which {type(model.model).__name__} does "
                "not have; use SteerPAG, SteerSEG or SteerSLG."
            )
        return (Attention("self", (MIDDLE,), self.look),)

    def look(self, target, beside, attend, call, weight, role):
        """Keeps where the middle block looks, [B, 1, H, W]; a part of the picture (an area) does not show the whole."""
        if role in ("positive", "negative") and target.shape[2:] == call.x.shape[2:]:
            seen = received(target).view(-1, 1, *target.grid()[1:])
            call.seen.setdefault(self, {}).setdefault(role, []).append(seen)
        return attend(target)

    def add(self, call, extra, weight):
        role = "negative" if "negative" in call.predictions else "positive"
        D, seen = call.predictions[role], call.seen.get(self, {}).get(role)
        if D.ndim != 4 or not seen:
            raise ValueError(
                f"SteerSAG: needs the attention of the {role} over a whole image; "
                + (f"this latent has {D.ndim} dimensions." if D.ndim != 4 else f"give the {role} one without an area.")
            )
        mask = (torch.stack(seen).mean(0) > THRESHOLD).to(D.dtype)
        mask = torch.nn.functional.interpolate(mask, D.shape[-2:])
        degraded = D + mask * (blur(D, self.sigma) - D)
        a = torch.as_tensor(signal(call.run.sampling, call.sigma)).to(D).view(-1, 1, 1, 1)
        (again,) = call.predict([call.conds[role]], [f"SAG of {role}"], call.x + a * (degraded - D))
        return (degraded - again) * (self.s * weight)


def received(call):
    """Attention that each token receives: the map averaged over heads, summed over queries, [B, N]; 1 on average."""
    b, n, width = call.q.shape
    q, k = (t.float().view(b, n, call.heads, -1).transpose(1, 2) for t in (call.q, call.k))
    scale = (width // call.heads) ** -0.5
    heads = ((q[:, h] @ k[:, h].mT * scale).softmax(-1).sum(1) for h in range(call.heads))
    return sum(heads) / call.heads


def blur(x, sigma):
    """Gaussian blur of the last two dimensions, mirrored at the borders."""
    rows, columns = (gaussian(n, sigma, x) for n in x.shape[-2:])
    return rows @ x @ columns.mT


def apply(model, s, sigma, schedule):
    return steer(model, SAG(schedule, s, sigma))
