"""Guidance by a measurement: Diffusion Posterior Sampling (Chung et al. 2023, arXiv 2209.14687) and projections onto
what was measured (DDNM, Wang et al. 2023, arXiv 2212.00490)."""

from dataclasses import dataclass, field

import torch

from ..shared.conditioning import digest
from ..shared.decode import Decoder, decoder, fits, stored, vjp, worked
from ..shared.energy import Energy, carried, open_share
from ..shared.gradient import gradients, own
from ..shared.steering import blame, number
from .operator import Operator

MODES = ("soft", "hard")
EXACT = 1e-4  # how far A(A^+ y) may be from y


@dataclass(frozen=True)
class Measurement(Energy):
    """soft: E = |y - A x|^2 / (2 sigma_y^2), or |y - A x| for a sigma_y of 0, as DPS weighs its step.
    hard: x - A^+(A x - y) at each step.

    x is the decoded estimate, or without a decoder the estimate itself, as the host stores latents.
    """

    operator: Operator = None
    sigma_y: float = 0.0
    measured: str = ""  # tells measurements apart
    y: torch.Tensor = field(default=None, compare=False, repr=False)
    decoder: Decoder | None = field(default=None, compare=False, repr=False)
    node = "SteerMeasurement"

    def check(self):
        super().check()
        number("sigma_y", self.sigma_y)

    def uses(self):
        return () if self.decoder is None else (self.decoder.patcher,)

    def prepare(self, run):
        super().prepare(run)
        if self.decoder is not None:
            fits(self.decoder, run)
        if len(self.y) not in (1, run.size):
            raise ValueError(f"there are {len(self.y)} measurements for a batch of {run.size}; give one, or as many.")
        self.residual(torch.zeros(self.seen(run)))

    def seen(self, run):
        """Shape [1, C, H, W] of what is measured in a run."""
        n = 1 if self.decoder is None else self.decoder.factor
        return 1, run.shape[1] if self.decoder is None else 3, *(n * size for size in run.shape[-2:])

    def residual(self, x):
        """A x - y [B, ...]; ValueError where the shapes do not belong together."""
        found, y = self.operator(x), own(self.y).to(x)
        if found.shape[1] == 1 and y.shape[1] == 3:  # a grey picture as an IMAGE
            y = y.mean(1, keepdim=True)
        if found.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"{self.node}: what was measured has the shape {tuple(y.shape[1:])}, and of what is made here the "
                f"operator would give {tuple(found.shape[1:])}; make it in the size of the measurement."
            )
        return found - y

    def judge(self, x):
        """E [B] of x [B, C, H, W]."""
        square = self.residual(x).float().flatten(1).square().sum(1)
        return (square + 1e-12).sqrt() if self.sigma_y == 0.0 else square / (2 * self.sigma_y**2)

    def slope(self, D, call):
        D = D.requires_grad_()
        latents = stored(call.run.model.model, D)
        if self.decoder is not None:
            losses, back = self.decoder.slope(latents.detach(), self.judge)
            return losses, vjp(latents, D, back)
        losses = self.judge(latents)
        return losses.detach(), torch.autograd.grad(losses.sum(), D)[0]


@dataclass(frozen=True)
class Projection(Measurement):
    """Hard consistency: no slope, and no graph."""

    def prepare(self, run):
        super().prepare(run)
        projects(self.operator, torch.rand(self.seen(run), generator=torch.Generator().manual_seed(0)))

    def traces(self, call):
        return False

    def energy(self, denoised, call, weight):
        return None

    def constrain(self, denoised, call, weight):
        if not self.due(call):
            return denoised
        model, share = call.run.model.model, min(1.0, self.push.strength * weight)
        mask = open_share(denoised, call, self.push.mask)[3]
        with gradients(*self.uses()), torch.no_grad():
            D = own(denoised)
            for _ in range(self.push.recurrence):
                z = stored(model, D)
                if self.decoder is None:
                    moved = z - share * self.operator.pinv(self.residual(z), z)
                else:  # what the encoder loses is lost on both sides
                    x = self.decoder.picture(z)
                    nearer = (x - share * self.operator.pinv(self.residual(x), x)).clamp(0, 1)
                    moved = z + self.decoder.encode(nearer) - self.decoder.encode(x)
                D = D + mask * (worked(model, moved) - D)
        return D.to(denoised)


def apply(model, operator, push, schedule, mode="soft", sigma_y=0.0, image=None, latent=None, vae=None, measure=True):
    """image: IMAGE [b, H, W, 3], with `vae`, or latent: [b, C, H, W]. measure: it is a picture that the operator shall
    measure; otherwise it is what was measured."""
    kind = {"soft": Measurement, "hard": Projection}.get(mode)
    with blame(Measurement):
        if kind is None:
            raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}.")
        if (image is None) == (latent is None):
            raise ValueError("wire either image or latent: one of them is measured.")
        if image is not None and vae is None:
            raise ValueError("an image is measured in the decoded estimate: wire the vae.")
        its = None if image is None else decoder(vae)
        given = latent if image is None else image[..., :3].movedim(-1, 1).float()
        y = operator(given) if measure else given
        return carried(model, kind(schedule, push, operator, sigma_y, digest(y), y, its))


def projects(operator, x):
    """Raises ValueError unless A(A^+ A x) = A x, so that a projection meets what was measured."""
    y = operator(x)
    off = float((operator(operator.pinv(y, x)) - y).abs().max())
    if off > EXACT * max(1.0, float(y.abs().max())):
        raise ValueError(
            f"this chain of operators has no inverse that meets what was measured (it is off by {off:.3g}); set mode "
            "to soft, or use one operator alone."
        )
