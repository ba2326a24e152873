"""Regions and Personalize Anything on the lab's trained models.

    python tests/bench/lab_tokens.py [--pairs 32] [--seeds 4] [--steps 12] [--tables 1 2 3]

Do the words of two persons stay with their person? Pictures of 256 x 128, twice as wide as the models were trained on,
by one prompt of two captions, which differ in expression, hair colour, glasses, hat and shirt. The words of the first
have the left half, those of the second the right.
    own     share of these factors that the reader finds in a half as its own caption has them
    leaked  share that it finds there as the other caption has them
Does a head that stood on the left keep its face on the right? As many portraits as pairs, inverted under their
captions; drawn from noise by a prompt that names the style, and says anew expression, position, shirt and background.
    its own   share of pictures whose face is nearer to that of their own source than to that of any other source
    identity  similarity of the face to the source's; 1 is the same
    place     share in which the reader finds the position
    around    share of shirts and backgrounds that are as the prompt says
    inside    share of expressions that are: the head is the source's, the prompt wants another
Writes tests/bench/lab_tokens.md.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS, SIDE = Path(__file__).with_suffix(".md"), 128
CFG, MOVING_CFG, SHIFT = 4.0, 2.5, 32  # pixels by which a head is moved: two tokens
LEAK = ("own", "leaked")
FACTORS = ("expression", "hair_color", "glasses", "hat", "shirt")
INTRO = (
    "# Tokens and regions on the lab\n\nEach table says by which command it was made; what the columns mean is said at "
    f"the top of `tests/bench/lab_tokens.py`. Euler, cfg {CFG}, for a head that "
    f"is moved {MOVING_CFG}. The lab proves no looks on other models."
)


@cache
def lab(which):
    from steer.models.lab.load import load_model
    from steer.models.lab.reader import load_reader

    return *load_model(which), load_reader()


def pairs(count, first):
    """[(portrait, another of the same style on the same ground that differs in all FACTORS)], held out."""
    from steer.models.lab import data, portrait

    found = []
    for seed in range(data.HELD_OUT + first, data.HELD_OUT + first + 2 * count, 2):
        a, b = (portrait.Portrait.from_seed(s) for s in (seed, seed + 1))
        changed = {"style": a.style, "background": a.background, "pattern": a.pattern}
        for name in FACTORS:
            if getattr(a, name) == getattr(b, name):
                values = portrait.FACTORS[name]
                changed[name] = values[(values.index(getattr(a, name)) + 1) % len(values)]
        found.append((a, replace(b, **changed)))
    return found


def halves():
    """MASKs [1, 128, 256] of the left and of the right half."""
    import torch

    left = torch.zeros(1, SIDE, 2 * SIDE)
    left[..., :SIDE] = 1.0
    return left, 1.0 - left


def two_persons(which, count, seed, steps, strength=1.0, isolate="auto", end=1.0):
    """{column: mean over the halves}."""
    import torch
    import toy
    from steer.models.lab.captions import caption
    from steer.models.lab.evaluate import conditioning
    from steer.patches.shared.schedule import Schedule
    from steer.patches.tokens import regions

    model, clip, vae, reader = lab(which)
    sigmas, hits = toy.sigmas(model, steps, "simple" if which == "dit" else "normal"), []
    for i, two in enumerate(pairs(count, 9000 + 1000 * seed)):
        words = [caption(p, ("style", *FACTORS)) for p in two]
        given = list(zip(words, halves(), strict=True))
        schedule = Schedule(0.0, end)
        ours, positive = regions.apply(model, clip, ", ".join(words), given, strength, isolate, "auto", schedule)
        start = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(1000 * seed + i))
        out = toy.sample(ours, CFG, positive=positive, negative=conditioning(clip, [""]), start=start, sigmas=sigmas)
        with torch.inference_mode():
            x = vae.decode(out).movedim(-1, 1).float().clamp(0, 1)
            read = reader.read(torch.cat(x.chunk(2, -1)))
        hits += [
            [[r[name][0] == getattr(p, name) for name in FACTORS] for p in (mine, other)]
            for r, mine, other in zip(read, two, two[::-1], strict=True)
        ]
    own, leaked = torch.tensor(hits).float().mean((0, 2)).tolist()
    return {"own": own, "leaked": leaked}


REGIONS = {  # setting: (models, options of two_persons)
    "prompt alone": (("unet", "dit"), {"strength": 0.0}),
    "Regions": (("unet", "dit"), {}),
    "isolate on": (("unet",), {"isolate": "on"}),
    "isolate off": (("dit",), {"isolate": "off"}),
    "strength 0.5": (("unet", "dit"), {"strength": 0.5}),
    "to 50 %": (("unet", "dit"), {"end": 0.5}),
}


def leaks(which, pairs, seeds, steps):
    for name, (models, options) in REGIONS.items():
        if which in models:
            found = [two_persons(which, pairs, seed, steps, **options) for seed in range(seeds)]
            yield name, {column: sum(f[column] for f in found) / seeds for column in LEAK}


class Moving:
    """Portraits on the left, inverted, and what shall become of them on the right."""

    def __init__(self, count, seed, steps):
        import numpy as np
        import torch
        import toy
        from steer.models.lab import data
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning
        from steer.models.lab.portrait import FACTORS as ALL
        from steer.models.lab.portrait import Portrait, draw, draw_masks
        from steer.patches.inversion.invert import invert

        self.model, clip, self.vae, self.reader = lab("dit")
        seeds = range(data.HELD_OUT + 20000 + 1000 * seed, data.HELD_OUT + 20000 + 1000 * seed + count)
        people = [Portrait.from_seed(s, position="left") for s in seeds]

        def other(p, name):
            return ALL[name][(ALL[name].index(getattr(p, name)) + 1) % len(ALL[name])]

        changed = ("expression", "shirt", "background")
        self.wanted = [replace(p, position="right", **{n: other(p, n) for n in changed}) for p in people]
        self.positive = conditioning(clip, [caption(p, ("style", "position", *changed)) for p in self.wanted])
        self.nothing = conditioning(clip, [""] * count)
        pictures = torch.from_numpy(np.stack([draw(p) for p in people])).float() / 255
        self.subject = torch.from_numpy(np.stack([draw_masks(p)["head"] for p in people]))
        self.target = torch.nn.functional.pad(self.subject, (SHIFT, -SHIFT))
        self.sigmas, before = toy.sigmas(self.model, steps, "simple"), conditioning(clip, [caption(p) for p in people])
        self.start = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            latent = self.vae.encode(pictures)
            self.path = invert(self.model, before, latent, self.sigmas, "fixed-point")
            self.faces = self.reader(self.show(latent))[2]

    def show(self, latent):
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)

    def figures(self, threshold, strength, **options):
        """{column: mean over the pictures}."""
        import torch
        import toy
        from steer.patches.shared.schedule import Schedule
        from steer.patches.tokens import personalizeanything

        model = personalizeanything.apply(
            self.model, self.path, self.subject, threshold, strength, Schedule(), target=self.target, **options
        )
        given = {"positive": self.positive, "negative": self.nothing, "start": self.start, "sigmas": self.sigmas}
        out = toy.sample(model, MOVING_CFG, **given)
        with torch.inference_mode():
            x = self.show(out)
            read, face = self.reader.read(x), self.reader(x)[2]
        alike = face @ self.faces.T

        def share(*names):
            found = [[r[n][0] == getattr(p, n) for n in names] for r, p in zip(read, self.wanted, strict=True)]
            return float(torch.tensor(found).float().mean())

        return {
            "its own": float((alike.argmax(1) == torch.arange(len(alike))).float().mean()),
            "identity": float(alike.diagonal().mean()),
            "place": share("position"),
            "around": share("shirt", "background"),
            "inside": share("expression"),
        }


@cache
def moving(count, seed, steps):
    return Moving(count, seed, steps)


def moved(count, seed, steps, threshold, strength, **options):
    return moving(count, seed, steps).figures(threshold, strength, **options)


MOVED = {  # setting: (threshold, strength, options)
    "prompt alone": (0.0, 0.0, {}),
    "threshold 0.8, the default": (0.8, 1.0, {}),
    "threshold 1": (1.0, 0.0, {}),
    "threshold 0.8, strength 0": (0.8, 0.0, {}),
    "threshold 0.5": (0.5, 1.0, {}),
    "threshold 0.5, strength 0": (0.5, 0.0, {}),
    "threshold 0.2": (0.2, 1.0, {}),
    "threshold 0.2, strength 0": (0.2, 0.0, {}),
    "threshold 0": (0.0, 1.0, {}),
    "threshold 0.8, perturbation 0.5": (0.8, 1.0, {"perturbation": 0.5}),
}
FACES = ("its own", "identity", "place", "around", "inside")


def moves(pairs, seeds, steps):
    for name, (threshold, strength, options) in MOVED.items():
        found = [moved(pairs, seed, steps, threshold, strength, **options) for seed in range(seeds)]
        yield name, {column: sum(f[column] for f in found) / seeds for column in FACES}


TABLES = (
    ("Two persons, Lab-UNet (eps)", LEAK, lambda **size: leaks("unet", **size)),
    ("Two persons, Lab-DiT (flow)", LEAK, lambda **size: leaks("dit", **size)),
    ("A head goes to another place, Lab-DiT (flow)", FACES, moves),
)


def main():
    size, numbers = arguments(__doc__, pairs=32, seeds=4, steps=12)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
