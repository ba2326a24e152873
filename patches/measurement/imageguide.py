"""Guidance by a picture: the image guider of Latent Diffusion (Rombach et al. 2022, arXiv 2112.10752, appendix C), with
pixels, features or colours."""

from dataclasses import dataclass, field

import torch

from ..shared.conditioning import digest
from ..shared.decode import decoder, fitted
from ..shared.energy import Seen, carried
from ..shared.scorer import Features
from ..shared.steering import blame

LOSSES = ("L2", "perceptual", "palette")
WAYS = 24  # directions through the space of colours


@dataclass(frozen=True)
class ImageGuide(Seen):
    """L2          mean |x - guide|^2: its pixels, where they are
    perceptual  1 - cosine of what another network sees, at each place and at all: what it shows, where it is
    palette     squared distance of optimal transport between the colours, along fixed directions: not where they are
    """

    how: str = "L2"
    guides: str = ""  # tells guides apart
    guide: torch.Tensor = field(default=None, compare=False, repr=False)  # [b, 3, H, W] in 0..1
    eyes: Features | None = field(default=None, compare=False, repr=False)
    node = "SteerImageGuide"

    def uses(self):
        return (*super().uses(), *(() if self.eyes is None else self.eyes.patchers))

    def prepare(self, run):
        super().prepare(run)
        if len(self.guide) not in (1, run.size):
            raise ValueError(f"there are {len(self.guide)} guides for a batch of {run.size}; give one, or as many.")

    def judge(self, pictures):
        guide = fitted(self.guide, pictures)
        if self.how == "L2":
            return (pictures - guide).square().mean((1, 2, 3))
        if self.how == "palette":
            return palette(pictures, guide)
        with torch.no_grad():
            aim = self.eyes.features(guide)
        found = self.eyes.features(pictures)
        places, whole = (torch.cosine_similarity(a, b, dim=-1) for a, b in zip(found, aim, strict=True))
        return 2 - places.mean(1) - whole


def palette(pictures, guide):
    """Sliced Wasserstein distance [B] between the colours of pictures [B, 3, H, W] and of their guides."""
    ways = torch.randn(WAYS, 3, generator=torch.Generator().manual_seed(0))
    ways = (ways / ways.norm(dim=1, keepdim=True)).to(pictures)
    ours, its = ((ways @ x.flatten(2)).sort(-1).values for x in (pictures, guide))
    return (ours - its).square().mean((1, 2))


def apply(model, vae, image, loss, push, schedule, eyes=None):
    """image: IMAGE [b, H, W, 3].  eyes: `Features`, for the loss "perceptual"."""
    with blame(ImageGuide):
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is unknown; choose one of {', '.join(LOSSES)}.")
        if loss == "perceptual" and not hasattr(eyes, "features"):
            raise ValueError("perceptual needs a network that looks: wire clip_vision, or a scorer that has features.")
        guide = image[..., :3].movedim(-1, 1).float()
        its = decoder(vae)
    term = ImageGuide(schedule, push, its, loss, digest(guide), guide, eyes if loss == "perceptual" else None)
    return carried(model, term)
