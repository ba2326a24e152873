"""Masks on the lab's trained models: does DiffEdit find what changes, and does Keep Region keep the rest?

    python tests/bench/lab_masks.py [--portraits 32] [--sets 4] [--steps 20] [--tables 1 2]

Held-out portraits without hats; one factor of each is changed in the caption.
    IoU         of DiffEdit's mask with the truth: the drawn region, or where the two drawn portraits differ; mean and
                lowest, and the mean of the best mask that the latent's cells allow
    kept        PSNR of the edited picture to the portrait as the VAE renders it, in dB, more than 8 pixels outside of
                the mask, without and with Keep Region, from the inverted noise at cfg 5; mean and lowest. The mask is
                the drawn region, which a changed colour leaves where it was
    edited      share of pictures in which the reader sees the change
Writes the chosen tables into tests/bench/lab_masks.md.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_name("lab_masks.md")
CFG = 5.0
EDITS = {  # factor, from, to, drawn region (None: where the drawn portraits differ)
    "hair colour": ("hair_color", "black", "red", "hair"),
    "background colour": ("background", "blue", "pink", "background"),
    "hat on": ("hat", "no hat", "crown", None),
    "shirt colour": ("shirt", "blue", "red", None),
    "short to long hair": ("hair_style", "short", "long", None),
    "expression": ("expression", "happy", "angry", None),
    "glasses on": ("glasses", "no glasses", "glasses", None),
}


class Pairs:
    """Portraits before and after an edit: pictures and latents [B, ...], captions, and the region between [B, H, W]."""

    def __init__(self, which, edit, portraits, first):
        import numpy as np
        import torch
        from bench.lab_guidance import lab
        from steer.models.lab import data, portrait
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning

        (self.model, self.clip, self.vae), self.reader = lab(which)
        factor, before, after, region = EDITS[edit]
        self.factor, self.after = factor, after
        seeds = [data.HELD_OUT + first + i for i in range(portraits)]
        sides = [
            [portrait.Portrait.from_seed(seed, **{"hat": "no hat", factor: value}) for seed in seeds]
            for value in (before, after)
        ]
        drawn = [np.stack([portrait.draw(p) for p in side]).astype(int) for side in sides]
        if region:
            self.region = torch.from_numpy(np.stack([portrait.draw_masks(p)[region] for p in sides[0]]))
        else:
            self.region = torch.from_numpy(abs(drawn[0] - drawn[1]).max(-1) > 24).float()
        self.source, self.target = (conditioning(self.clip, [caption(p) for p in side]) for side in sides)
        self.negative = conditioning(self.clip, [""])
        with torch.inference_mode():
            self.latent = self.vae.encode(torch.from_numpy(drawn[0]).float() / 255)

    def iou(self, mask):
        """[B], with the region."""
        return (mask * self.region).sum((1, 2)) / mask.maximum(self.region).sum((1, 2))


def found(which, edit, portraits, first):
    """(IoU of the mask [B], IoU of the best one on cells of 8 pixels [B])."""
    import torch
    from steer.patches.inversion.diffeditmask import mask
    from steer.patches.shared.mask import enlarge

    pairs = Pairs(which, edit, portraits, first)
    with torch.inference_mode():
        ours = mask(pairs.model, pairs.source, pairs.target, pairs.latent)[0]
    share = torch.nn.functional.avg_pool2d(pairs.region, 8)
    best = torch.stack([pairs.iou(enlarge((share > t / 20).float(), 8)) for t in range(1, 20)]).amax(0)
    return pairs.iou(ours), best


def kept(which, edit, portraits, first, steps):
    """{"without" or "with": (PSNR outside [B], whether the edit shows [B])}."""
    import torch
    import toy
    from steer.patches.inversion import keepregion
    from steer.patches.inversion.invert import InvertedNoise, invert
    from steer.patches.shared.mask import grow
    from steer.patches.shared.schedule import Schedule

    pairs = Pairs(which, edit, portraits, first)
    model, latent = pairs.model, pairs.latent
    sigmas = toy.sigmas(model, steps, "normal" if which == "unet" else "simple")
    with torch.inference_mode():
        path = invert(model, pairs.source, latent, sigmas, "fixed-point", 3)
        drawn = pairs.vae.decode(latent)
    start = InvertedNoise(path, model).generate_noise({"samples": latent})
    outside = (grow(pairs.region, 8) == 0)[..., None]
    keeping = keepregion.apply(model, pairs.region, path, 0, 0, Schedule())
    figures = {}
    for name, steered in (("without", model), ("with", keeping)):
        out = toy.sample(steered, CFG, positive=pairs.target, negative=pairs.negative, start=start, latent=latent,
                         sigmas=sigmas)
        with torch.inference_mode():
            picture = pairs.vae.decode(out)
        error = ((picture - drawn).square() * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3)))
        read = pairs.reader.read(picture.movedim(-1, 1).float().clamp(0, 1))
        shows = [each[pairs.factor][0] == pairs.after for each in read]
        figures[name] = -10 * error.log10(), torch.tensor(shows).float()
    return figures


def joined(measure, sets):
    """Figures of all sets, side by side."""
    import torch

    return [torch.cat(parts) for parts in zip(*(measure(7000 + 1000 * n) for n in range(sets)), strict=True)]


def masks(portraits, sets, steps):
    for edit in EDITS:
        for which in ("unet", "dit"):
            ours, best = joined(partial(found, which, edit, portraits), sets)
            yield f"{edit}, {which}", {"IoU": ours.mean(), "lowest": ours.min(), "best on cells": best.mean()}


def regions(portraits, sets, steps):
    import torch

    for edit in ("hair colour", "background colour"):
        for which in ("unet", "dit"):
            each = [kept(which, edit, portraits, 7000 + 1000 * n, steps) for n in range(sets)]
            for name in ("without", "with"):
                psnr, shows = (torch.cat(parts) for parts in zip(*(figures[name] for figures in each), strict=True))
                cells = {"kept": psnr.mean(), "lowest": psnr.min(), "edited": shows.mean()}
                yield f"{edit}, {which}, {name}", cells


TABLES = (
    ("DiffEdit Mask", ("IoU", "lowest", "best on cells"), masks),
    ("Keep Region", ("kept", "lowest", "edited"), regions),
)
INTRO = (
    "# Masks on the lab\n\nEach table says by which command it was made; what the columns mean is said at the top of "
    "`tests/bench/lab_masks.py`."
)


def main():
    size, numbers = arguments(__doc__, portraits=32, sets=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".2f")


if __name__ == "__main__":
    main()
