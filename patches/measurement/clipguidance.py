"""CLIP guidance: the estimate is pulled to where an image encoder sees what a text encoder reads (Crowson 2021; GLIDE,
arXiv 2112.10741, with a CLIP of clean pictures)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..shared.conditioning import digest
from ..shared.decode import decoder
from ..shared.energy import Seen, carried
from ..shared.scorer import Features
from ..shared.steering import blame, number
from ..shared.vision import vision

LEAST = 0.4  # side of the smallest cutout, of the picture's


@dataclass(frozen=True)
class CLIPGuidance(Seen):
    """E = mean over cutouts of 2 arcsin(|u - v| / 2)^2, the squared angle between what is seen and the text, halved.

    Cutouts are squares from `LEAST` of the picture to all of it, at places that are the same in every step and run of a
    seed; with none the picture is seen as it is.
    """

    cutouts: int = 0
    seed: int = 0
    read: str = ""  # tells texts apart
    text: torch.Tensor = field(default=None, compare=False, repr=False)  # [1, E], of length 1
    eyes: Features = field(default=None, compare=False, repr=False)
    node = "SteerCLIPGuidance"

    def check(self):
        super().check()
        number("cutouts", self.cutouts, 0, 256)

    def uses(self):
        return (*super().uses(), *self.eyes.patchers)

    def judge(self, pictures):
        return torch.stack([self.angle(part) for part in self.parts(pictures)]).mean(0)

    def angle(self, pictures):
        seen = F.normalize(self.eyes.features(pictures)[1].to(pictures.device), dim=-1)
        half = (seen - self.text.to(seen)).norm(dim=-1) / 2
        return 2 * half.clamp(max=1 - 1e-6).arcsin().square()

    def parts(self, pictures):
        if not self.cutouts:
            yield pictures
        places = torch.rand(self.cutouts, 3, generator=torch.Generator().manual_seed(self.seed)).tolist()
        height, width = pictures.shape[-2:]
        for size, x, y in places:
            side = max(1, round(min(height, width) * (LEAST + (1 - LEAST) * size)))
            top, left = round((height - side) * y), round((width - side) * x)
            yield pictures[..., top : top + side, left : left + side]


def pooled(clip, text):
    """The pooled text [n, E] in the space that a CLIP shares with its image encoder; None where there is none.

    Models that want it before the projection (SD1.x, Flux) make the host leave the projection out: it is applied here.
    ValueError where the file had none; the host leaves such weights as the memory was.
    """
    tokens, parts = clip.tokenize(text), clip.cond_stage_model.children()
    found = [part for part in parts if hasattr(getattr(part, "transformer", None), "text_projection")]
    read = clip.encode_from_tokens(tokens, return_pooled=True)[1]
    if read is None or len(found) != 1 or found[0].return_projected_pooled:
        return read
    weight = found[0].transformer.text_projection.weight.float()
    if not (weight.isfinite().all() and 1e-4 < weight.std() < 10):
        raise ValueError(
            "the text encoder has no projection, as in checkpoints of SD1.x; load it from a file of its own with Load "
            "CLIP, such as clip_l.safetensors."
        )
    return F.linear(read.to(weight), weight)


def apply(model, vae, clip, clip_vision, text, push, schedule, cutouts=0, seed=0):
    """clip: a CLIP of the host, of which the first pooled text is taken.  clip_vision: its image encoder."""
    with blame(CLIPGuidance):
        read = pooled(clip, text)
        width = getattr(clip_vision.model, "visual_projection", None)
        width = getattr(width, "out_features", None)
        if read is None or width is None or read.shape[-1] != width:
            has = "none" if read is None else read.shape[-1]
            raise ValueError(
                f"text and pictures have no space in common: the text encoder gives {has} numbers, the image encoder "
                f"{width}; wire the two encoders of one CLIP."
            )
        its, eyes = decoder(vae), vision(clip_vision)
        read = F.normalize(read[:1].float(), dim=-1)
    return carried(model, CLIPGuidance(schedule, push, its, cutouts, seed, digest(read), read, eyes))
