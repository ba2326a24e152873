"""Regions and Personalize Anything on the lab's trained models.

    python tests/bench/lab_tokens.py [--pairs 32] [--seeds 4] [--steps 12] [--tables 1 2 3 4 5]

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
Do two subjects come together? The head of one portrait, and the body of another or the ground it stands on, drawn from
noise by a prompt that names style, place and what is left: the ground, or the shirt.
    head      share of expression, skin, hair, glasses and hat that are as in the first
    identity  similarity of the face to the first's
    second    share of what comes from the second, as in it: the shirt, or background and pattern
    prompted  share of what the prompt names beside it
Is the rest kept where a part is painted anew? Inside: all but the head is kept, and the prompt has another hat and
expression; outside: the middle of a picture of which a border of 16 pixels was lost, under its caption.
    new       share of hat and expression as the prompt says, or of background and pattern as the whole picture had them
    kept      share of shirt, background and pattern, or of what the head shows, as in the source
    PSNR      to the source, in dB, where it is kept;  truth  to the picture as it would be drawn, in all
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


def inverted(model, clip, latent, people, sigmas):
    """The trajectory of the latents of portraits, under their captions."""
    from steer.models.lab.captions import caption
    from steer.models.lab.evaluate import conditioning
    from steer.patches.inversion.invert import invert

    return invert(model, conditioning(clip, [caption(p) for p in people]), latent, sigmas, "fixed-point")


HEAD = ("expression", "skin", "hair_style", "hair_color", "glasses", "hat")
GROUND = ("background", "pattern")


class Together:
    """Portraits in the middle of their pictures, inverted two by two, and what shall become of each pair."""

    def __init__(self, count, seed, steps, second):
        import numpy as np
        import torch
        import toy
        from steer.models.lab import data
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning
        from steer.models.lab.portrait import FACTORS as ALL
        from steer.models.lab.portrait import Portrait, draw, draw_masks

        self.model, clip, self.vae, self.reader = lab("dit")
        first = data.HELD_OUT + 30000 + 1000 * seed
        heads = [Portrait.from_seed(first + n, position="center") for n in range(count)]
        others = [Portrait.from_seed(first + 500 + n, position="center", style=p.style) for n, p in enumerate(heads)]
        self.second, self.asked = (("shirt",), GROUND) if second == "body" else (GROUND, ("shirt",))

        def third(name, *taken):
            return next(value for value in ALL[name] if value not in taken)

        self.wanted = [
            replace(p, **{n: getattr(o, n) for n in self.second},
                    **{n: third(n, getattr(p, n), getattr(o, n)) for n in self.asked})
            for p, o in zip(heads, others, strict=True)
        ]
        told = ("style", "position", *self.asked)
        self.positive = conditioning(clip, [caption(p, told) for p in self.wanted])
        self.nothing = conditioning(clip, [""] * count)
        self.sigmas = toy.sigmas(self.model, steps, "simple")
        self.start = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        self.given = []
        for people, what in ((others, second), (heads, "head")):
            pictures = torch.from_numpy(np.stack([draw(p) for p in people])).float() / 255
            parts = [draw_masks(p) for p in people]
            parts = [1 - m["head"] - m["background"] if what == "body" else m[what] for m in parts]
            with torch.inference_mode():
                path = inverted(self.model, clip, self.vae.encode(pictures), people, self.sigmas)
                self.faces = self.reader(pictures.movedim(-1, 1))[2]
            self.given.append((path, torch.from_numpy(np.stack(parts))))

    def figures(self, threshold, strength):
        """{column: mean over the pictures}."""
        import torch
        import toy
        from steer.patches.shared.schedule import Schedule
        from steer.patches.tokens import personalizeanything

        model = self.model
        for path, mask in self.given:
            model = personalizeanything.apply(model, path, mask, threshold, strength, Schedule())
        given = {"positive": self.positive, "negative": self.nothing, "start": self.start, "sigmas": self.sigmas}
        with torch.inference_mode():
            x = self.vae.decode(toy.sample(model, MOVING_CFG, **given)).movedim(-1, 1).float().clamp(0, 1)
            read, face = self.reader.read(x), self.reader(x)[2]
        found = {"head": HEAD, "second": self.second, "prompted": self.asked}
        return {**{column: shown(read, self.wanted, names) for column, names in found.items()},
                "identity": float((face * self.faces).sum(1).mean())}


def shown(read, wanted, names):
    """Share of the factors `names` that are read as wanted."""
    right = [r[n][0] == getattr(p, n) for r, p in zip(read, wanted, strict=True) for n in names]
    return sum(right) / len(right)


class Anew:
    """Portraits of which a part is lost or shall be another, inverted as they are."""

    def __init__(self, count, seed, steps, where):
        import numpy as np
        import torch
        import toy
        from steer.models.lab import data
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning
        from steer.models.lab.portrait import FACTORS as ALL
        from steer.models.lab.portrait import Portrait, draw, draw_masks

        self.model, clip, self.vae, self.reader = lab("dit")
        first = data.HELD_OUT + 40000 + 1000 * seed
        people = self.wanted = [Portrait.from_seed(first + n, position="center") for n in range(count)]
        pictures = torch.from_numpy(np.stack([draw(p) for p in people])).float() / 255
        if where == "inside":
            self.new, self.old = ("hat", "expression"), ("shirt", *GROUND)
            self.wanted = [
                replace(p, **{n: ALL[n][(ALL[n].index(getattr(p, n)) + 1) % len(ALL[n])] for n in self.new})
                for p in people
            ]
            heads = [np.maximum(draw_masks(p)["head"], draw_masks(w)["head"])
                     for p, w in zip(people, self.wanted, strict=True)]
            self.kept = 1 - torch.from_numpy(np.stack(heads))
        else:
            self.new, self.old = GROUND, HEAD
            self.kept = torch.zeros(count, SIDE, SIDE)
            self.kept[:, 16:-16, 16:-16] = 1.0
            pictures = torch.where(self.kept[..., None] > 0.5, pictures, 0.5)
        self.truth = torch.from_numpy(np.stack([draw(p) for p in self.wanted])).movedim(-1, 1).float() / 255
        self.positive = conditioning(clip, [caption(p) for p in self.wanted])
        self.nothing = conditioning(clip, [""] * count)
        self.sigmas = toy.sigmas(self.model, steps, "simple")
        self.start = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            self.latent = self.vae.encode(pictures)
            self.path = inverted(self.model, clip, self.latent, people, self.sigmas)
            self.source = self.show(self.latent)

    show = Moving.show

    def figures(self, threshold, strength, region=False):
        """{column: mean over the pictures}; region: Keep Region beside it."""
        import torch
        import toy
        from steer.patches.inversion import keepregion
        from steer.patches.shared.schedule import Schedule
        from steer.patches.tokens import personalizeanything

        model = personalizeanything.apply(self.model, self.path, self.kept, threshold, strength, Schedule())
        if region:
            model = keepregion.apply(model, 1 - self.kept, self.path, 0, False, Schedule())
        given = {"positive": self.positive, "negative": self.nothing, "start": self.start, "sigmas": self.sigmas}
        with torch.inference_mode():
            x = self.show(toy.sample(model, MOVING_CFG, **given))
            read = self.reader.read(x)

        def psnr(truth, where):
            error = ((x - truth).square().mean(1) * where).sum((1, 2)) / where.sum((1, 2))
            return float(-10 * error.log10().mean())

        return {
            "new": shown(read, self.wanted, self.new), "kept": shown(read, self.wanted, self.old),
            "PSNR": psnr(self.source, (self.kept > 0.5).float()), "truth": psnr(self.truth, torch.ones_like(self.kept)),
        }


def of(kind, settings):
    """rows of a table: kind(count, seed, steps, which).figures(...) for settings, {name: (which, options of it)}."""
    made = cache(kind)

    def rows(pairs, seeds, steps):
        for name, (which, options) in settings.items():
            found = [made(pairs, seed, steps, which).figures(*options) for seed in range(seeds)]
            yield name, {column: sum(f[column] for f in found) / seeds for column in found[0]}

    return rows


TOGETHER = {
    f"{title}, {name}": (second, options)
    for second, title in (("body", "head and body"), ("background", "head in a scene"))
    for name, options in {
        "prompt alone": (0.0, 0.0), "threshold 0.8": (0.8, 1.0), "threshold 0.5": (0.5, 1.0),
    }.items()
}
ANEW = {
    f"{where}, {name}": (where, options)
    for where in ("inside", "outside")
    for name, options in {
        "prompt alone": (0.0, 0.0), "threshold 0.1": (0.1, 0.0), "threshold 0.5": (0.5, 0.0),
        "threshold 0.9": (0.9, 0.0), "threshold 0.9, Keep Region": (0.9, 0.0, True), "Keep Region": (0.0, 0.0, True),
    }.items()
}

TABLES = (
    ("Two persons, Lab-UNet (eps)", LEAK, lambda **size: leaks("unet", **size)),
    ("Two persons, Lab-DiT (flow)", LEAK, lambda **size: leaks("dit", **size)),
    ("A head goes to another place, Lab-DiT (flow)", FACES, moves),
    ("Two subjects, Lab-DiT (flow)", ("head", "identity", "second", "prompted"), of(Together, TOGETHER)),
    ("A part painted anew, Lab-DiT (flow)", ("new", "kept", "PSNR", "truth"), of(Anew, ANEW)),
)


def main():
    size, numbers = arguments(__doc__, pairs=32, seeds=4, steps=12)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
