"""DiffuseIT (Kwon and Ye 2022, arXiv 2209.15264): the structure of a source picture, held by the features of another
network, and the looks of a prompt or of a target picture."""

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..shared.conditioning import digest
from ..shared.euler import signal
from ..shared.gradient import differentiable, gradients, own
from ..shared.scorer import Features
from ..shared.steering import Term, blame, number, steer

TEMPERATURE = 0.07  # of the contrastive loss
SIMILARITY, CONTRAST, SUMMARY, PIXELS = 1000.0, 200.0, 2000.0, 3000.0  # weights of the losses, the official ones
KEYS = ("k_proj", "key")  # names of what makes the keys in the host's vision transformers


@dataclass(frozen=True)
class Vision:
    """`Features` of a CLIP_VISION of the host: the keys of its last layer, [CLS] among them, and its embedding."""

    vision: Any = field(repr=False)
    patchers: tuple = field(repr=False)

    def features(self, pictures):
        (patcher,), eye, kept = self.patchers, self.vision, []
        network, size = patcher.model, (eye.image_size, eye.image_size)
        mean, std = (torch.tensor(v).view(3, 1, 1).to(pictures) for v in (eye.image_mean, eye.image_std))
        pictures = (F.interpolate(pictures, size, mode="bicubic", antialias=True) - mean) / std
        last = [module for name, module in network.named_modules() if name.split(".")[-1] in KEYS][-1]
        handle = last.register_forward_hook(lambda module, args, keys: kept.append(keys))
        try:
            embedding = network(pixel_values=pictures.to(patcher.load_device), intermediate_output=-2)[2]
        finally:
            handle.remove()
        return kept[0].float(), embedding.flatten(1).float()


def vision(model):
    """`Vision` of a CLIP_VISION; ValueError where it has no keys to look at."""
    if not any(name.split(".")[-1] in KEYS for name, _ in model.model.named_modules()):
        raise ValueError(f"finds no keys in this vision model ({type(model.model).__name__}); use a CLIP or DINOv2.")
    return Vision(model, (differentiable(model.patcher),))


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
    vae: Any = field(default=None, compare=False, repr=False)
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

    def prepare(self, run):
        signal(run.sampling, float(run.sigmas[0]))
        if len(run.shape) != 4:
            raise ValueError(f"looks at pictures, and this latent has {len(run.shape)} dimensions.")
        channels = getattr(self.vae[0], "latent_channels", run.shape[1])
        if channels != run.shape[1]:
            raise ValueError(f"the VAE is of another model: {channels} channels, the latent has {run.shape[1]}.")
        for name in ("source", "target"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, run.size):
                raise ValueError(f"{name} has {len(given)} pictures for a batch of {run.size}; give one, or as many.")

    def step(self, denoised, call, weight):
        from comfy.model_management import load_models_gpu

        (patcher,), latent_format = self.vae[1:], copy(call.run.model.model.latent_format)
        load_models_gpu([patcher, *self.eyes.patchers])
        with gradients(patcher, *self.eyes.patchers):
            vars(latent_format).update(own(vars(latent_format)))
            D = own(denoised).requires_grad_()
            losses = self.losses(decoded(*self.vae, latent_format.process_out(D)))
            (slope,) = torch.autograd.grad(losses.sum(), D)
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


def decoded(vae, patcher, latent):
    """Pictures [B, 3, H, W] in 0..1 of a latent as the host stores it, with their graph."""
    z = latent.to(patcher.load_device, vae.vae_dtype)
    return vae.process_output(patcher.model.decode(z).float().clone()).to(latent.device)[:, :3]


def fitted(pictures, like):
    """Pictures [b, 3, h, w] in the size and on the device of others, one for each or one for all."""
    pictures = own(pictures).to(like.device)
    if pictures.shape[-2:] != like.shape[-2:]:
        pictures = F.interpolate(pictures, like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    return pictures.expand(len(like), -1, -1, -1)


def apply(model, vae, image, strength, structure, appearance, schedule, eyes, target=None):
    """image, target: IMAGE [b, H, W, 3].  eyes: a CLIP_VISION, or `Features`."""
    with blame(DiffuseIT):
        if getattr(vae, "latent_dim", 2) != 2:
            raise ValueError("looks at pictures, and this VAE makes video or sound.")
        if hasattr(eyes, "encode_image"):
            eyes = vision(eyes)
        elif not hasattr(eyes, "features"):
            raise ValueError(f"the scorer ({type(eyes).__name__}) has no features to look at; wire a CLIP_VISION.")
        both = (vae, differentiable(vae.patcher))
        source, target = (None if i is None else i[..., :3].movedim(-1, 1).float() for i in (image, target))
    term = DiffuseIT(schedule, strength, structure, appearance, digest((source, target)), eyes, both, source, target)
    return steer(model, term)
