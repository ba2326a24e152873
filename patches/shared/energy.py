"""Energies: losses of the clean estimate whose slope moves it.

With x = a x0 + s n and an energy E per item, p(x0) exp(-E) has the clean estimate (Tweedie)

    D' = D - (s^2 / a) dE(D(x))/dx         "network": the slope through the whole guided evaluation (DPS, UGD)
       ~ D - r^2 dE/dD,  r^2 = s^2 / (a^2 + s^2)    "estimate": the slope at D alone (FreeDoM, MPGD, LGD)

The second is the first where the data are Gaussian with a variance of 1, in which case dD/dx = a r^2 / s^2. Both are
finite at the s = 1 of a flow, where a is 0: the first by a floor of a.

With `norm` "unit" only the direction of the slope counts: D moves by `strength` standard deviations of D times r, the
share of D that is still open. So one strength works for every loss, on every model.
"""

from dataclasses import dataclass, field

import torch

from .conditioning import digest
from .decode import Decoder, fits, stored, vjp
from .euler import signal
from .gradient import differentiable, gradients, own
from .mask import fit
from .steering import Other, Term, blame, in_order, number, steer

GRADIENTS, NORMS = ("estimate", "network"), ("unit", "none")
FLOOR = 0.05  # of a, where the slope through the network is divided by it


@dataclass(frozen=True)
class Push:
    """How an energy moves D; see above.

    every: it acts at each n-th step.  recurrence: steps down the slope at one evaluation; through the network its slope
    at x stays, and only that of the loss is taken anew.  mask: [b, h, w], where in the picture; None is all of it.
    """

    strength: float = 1.0
    gradient: str = "estimate"
    norm: str = "unit"
    every: int = 1
    recurrence: int = 1
    mask: torch.Tensor | None = field(default=None, compare=False, repr=False)
    masked: str = ""  # tells masks apart

    def check(self):
        number("strength", self.strength)
        number("every", self.every, 1)
        number("recurrence", self.recurrence, 1)
        for name, known in (("gradient", GRADIENTS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")

    def step(self, slope, factor, unit, mask):
        """What `slope` [B, C, ...] moves D by: times `factor`, or made of the length `unit`, a mean inside the mask."""
        if self.norm == "unit":
            dims = tuple(range(1, slope.ndim))
            square = (slope.square() * mask).sum(dims, keepdim=True)
            length = (square / mask.expand_as(slope).sum(dims, keepdim=True).clamp(min=1e-12)).sqrt()
            slope, factor = slope / length.clamp(min=1e-20), unit
        return slope * factor * self.strength * mask


def push(strength=1.0, gradient="estimate", norm="unit", every=1, recurrence=1, mask=None):
    """A `Push`. mask: MASK [b, h, w], or None."""
    return Push(strength, gradient, norm, every, recurrence, mask, "" if mask is None else digest(mask))


@dataclass(frozen=True)
class Energy(Term):
    """A term that moves D down the slope of `loss`."""

    push: Push = Push()

    def check(self):
        self.push.check()

    @property
    def off(self):
        return super().off or self.push.strength == 0.0

    def loss(self, D, call):
        """E [B] of D [B, C, ...], float32, in the latent space in which the model works; differentiable."""
        raise NotImplementedError

    def slope(self, D, call):
        """(E [B], dE/dD) at D, inside `gradients`."""
        D = D.requires_grad_()
        losses = self.loss(D, call)
        if not losses.requires_grad:
            raise ValueError(f"{self.node}: what judges the picture keeps no graph, so that it has no slope.")
        (slope,) = torch.autograd.grad(losses.sum(), D)
        return losses.detach(), slope

    def prepare(self, run):
        signal(run.sampling, float(run.sigmas[0]))
        if self.push.mask is not None:
            fit(self.push.mask, run.shape)
        if self.push.gradient == "network":
            through_the_network(run)

    def traces(self, call):
        return self.push.gradient == "network" and self.due(call)

    def due(self, call):
        """True at the steps at which it acts."""
        every, sigmas = self.push.every, call.run.sigmas[:-1]
        return every == 1 or int((sigmas - call.level).abs().argmin()) % every == 0

    def energy(self, denoised, call, weight):
        if not self.due(call):
            return None
        push = self.push
        a, s, spread, mask = open_share(denoised, call, push.mask)
        r = s / (a**2 + s**2).sqrt()
        shift = torch.zeros_like(denoised, dtype=torch.float32)
        with gradients(*self.uses()):
            for _ in range(push.recurrence):
                slope = self.slope(own(denoised).float() + shift, call)[1]
                factor = r**2
                if push.gradient == "network":
                    slope, factor = vjp(*call.graph, slope), s**2 / a.clamp(min=FLOOR)
                shift = shift - push.step(slope, factor, r * spread, mask) * weight
        return shift.to(denoised)


@dataclass(frozen=True)
class Seen(Energy):
    """An energy of what the decoded estimate shows."""

    decoder: Decoder = field(default=None, compare=False, repr=False)

    def judge(self, pictures):
        """E [B] of pictures [B, 3, H, W] in 0..1; differentiable."""
        raise NotImplementedError

    def uses(self):
        return (self.decoder.patcher,)

    def prepare(self, run):
        super().prepare(run)
        fits(self.decoder, run)

    def slope(self, D, call):
        D = D.requires_grad_()
        latents = stored(call.run.model.model, D)
        losses, back = self.decoder.slope(latents.detach(), self.judge)
        return losses, vjp(latents, D, back)


def open_share(D, call, mask=None):
    """(a, s, std of D, mask), each to be multiplied with D."""
    shape = [-1] + [1] * (D.ndim - 1)
    a, s = (own(torch.as_tensor(v)).to(D.device, torch.float32).view(shape)
            for v in (signal(call.run.sampling, call.sigma), call.sigma))
    m = torch.ones(1, device=D.device).view(shape) if mask is None else own(fit(mask, D.shape)).to(D.device)
    return a, s, own(D).float().std(tuple(range(1, D.ndim)), keepdim=True), m


def through_the_network(run):
    """Raises ValueError where D cannot be differentiated in x."""
    options, remedy = run.guider.model_options, 'set gradient to "estimate".'
    if "context_handler" in options:
        raise ValueError(f"goes back through the network, which here runs over context windows; {remedy}")
    if "multigpu_clones" in options:
        raise ValueError(f"goes back through the network, which here runs on several GPUs; {remedy}")
    for term in in_order(options):
        if any(isinstance(branch, Other) for branch in term.branches(run.model)):
            raise ValueError(f"goes back through the network, and {term.node} brings another one; {remedy}")


def carried(model, term):
    """A clone of `model` that carries an `Energy`; ValueError where it cannot."""
    if term.push.gradient == "network" and not term.off:
        with blame(term):
            model = differentiable(model)
    return steer(model, term)
