"""DiffuseIT (Kwon and Ye 2022, arXiv 2209.15264): the structure of a source picture, held by the features of another
network, and the looks of a prompt or of a target picture."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..shared.conditioning import digest
from ..shared.decode import Decoder, decoder, fits, fitted, stored, vjp
from ..shared.euler import signal
from ..shared.gradient import gradients, own
from ..shared.scorer import Features
from ..shared.steering import Term, blame, number, steer
from ..shared.vision import vision

TEMPERATURE = 0.07  # of the contrastive loss
SIMILARITY, CONTRAST, SUMMARY, PIXELS = 1000.0, 200.0, 2000.0, 3000.0  # weights of the losses, the official ones


@dataclass(frozen=True)
class DiffuseIT(Term):
    """D - s r std(D) n: n of length 1 along the gradient by D of the losses of the decoded picture, r the share of D
    that is still open, sigma / sqrt(a^2 + sigma^2).

    structure  1000 l_ssim + 200 l_cont to the source (equations 6 and 7 of the paper)
    target     2000 |summary - summary of the target|^2 + 3000 |picture - target|^2 (equation 11)
    """

    strength: float = 1.0
    structure: float = 1.0
    appearance: float = 1.0
    pictures: str = ""  # tells sources and targets apart
    eyes: Features = field(default=None, compare=False, repr=False)
    decoder: Decoder = field(default=None, compare=False, repr=False)
    source: torch.Tensor = field(default=None, compare=False, repr=False)  # [b, 3, H, W] in 0..1
    target: torch.Tensor | None = field(default=None, compare=False, repr=False)
    node = "SteerDiffuseIT"

    def check(self):
        for name in ("strength", "structure", "appearance"):
            number(name, getattr(self, name))

    @property
    def off(self):
        looks = self.target is not None and self.appearance > 0.0
        return super().off or self.strength == 0.0 or not (looks or self.structure > 0.0)

    def uses(self):
        return (self.decoder.patcher, *self.eyes.patchers)

    def prepare(self, run):
        signal(run.sampling, float(run.sigmas[0]))
        fits(self.decoder, run)
        for name in ("source", "target"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, run.size):
                raise ValueError(f"{name} has {len(given)} pictures for a batch of {run.size}; give one, or as many.")

    def step(self, denoised, call, weight):
        with gradients(*self.uses()):
            D = own(denoised).requires_grad_()
            latents = stored(call.run.model.model, D)
            slope = vjp(latents, D, self.decoder.slope(latents.detach(), self.losses)[1])
        dims = tuple(range(1, D.ndim))
        a, sigma = (torch.as_tensor(v).to(denoised) for v in (signal(call.run.sampling, call.sigma), call.sigma))
        r = (sigma / (a**2 + sigma**2).sqrt()).view(-1, *[1] * len(dims))
        length = slope.square().mean(dims, keepdim=True).sqrt().clamp(min=1e-12)
        return denoised - slope / length * (self.strength * weight * r * denoised.std(dims, keepdim=True))

    def losses(self, pictures):
        """[B] of pictures [B, 3, H, W] in 0..1."""
        keys, summary = self.eyes.features(pictures)
        with torch.no_grad():
            its, _ = self.eyes.features(fitted(self.source, pictures))
        loss = self.structure * (SIMILARITY * similarity(keys, its) + CONTRAST * contrast(keys, its))
        if self.target is not None:
            target = fitted(self.target, pictures)
            with torch.no_grad():
                aim = self.eyes.features(target)[1]
            pixels = (2 * (pictures - target)).square().mean((1, 2, 3))
            loss = loss + self.appearance * (SUMMARY * (summary - aim).square().mean(1) + PIXELS * pixels)
        return loss


def similarity(keys, source):
    """l_ssim [B]: mean squared difference of the cosines of keys [B, N, C] with each other, and of the source's."""
    S, its = (k @ k.mT for k in (F.normalize(keys, dim=-1), F.normalize(source, dim=-1)))
    return (S - its).square().mean((1, 2))


def contrast(keys, source):
    """l_cont [B]: each key is to be like the source's of its place, and unlike the source's of others."""
    scores = F.normalize(keys, dim=-1) @ F.normalize(source, dim=-1).mT / TEMPERATURE
    return scores.logsumexp(-1).mean(1) - scores.diagonal(dim1=1, dim2=2).mean(1)


def apply(model, vae, image, strength, structure, appearance, schedule, eyes, target=None):
    """image, target: IMAGE [b, H, W, 3].  eyes: a CLIP_VISION, or `Features`."""
    with blame(DiffuseIT):
        if hasattr(eyes, "encode_image"):
            eyes = vision(eyes)
        elif not hasattr(eyes, "features"):
            raise ValueError(f"the scorer ({type(eyes).__name__}) has no features to look at; wire a CLIP_VISION.")
        its = decoder(vae)
        source, target = (None if i is None else i[..., :3].movedim(-1, 1).float() for i in (image, target))
    term = DiffuseIT(schedule, strength, structure, appearance, digest((source, target)), eyes, its, source, target)
    return steer(model, term)
