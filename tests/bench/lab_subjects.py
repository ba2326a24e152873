"""Personalize Anything on the lab's trained DiT: two subjects, a subject in a scene, a part painted anew.

    python tests/bench/lab_subjects.py [--portraits 32] [--seeds 4] [--steps 12] [--tables 1 2]

Do two subjects come together? The head of one portrait, and the body of another or the ground it stands on, drawn from
noise by a prompt that names style, place and what is left: the ground, or the shirt.
    head      share of expression, skin, hair, glasses and hat that are as in the first
    identity  similarity of the face to the first's
    second    share of what comes from the second, as in it: the shirt, or background and pattern
    prompted  share of what the prompt names beside it
Is the rest kept where a part is painted anew? Inside: all but the head is kept, and the prompt has another hat and
expression; outside: the middle of a picture of which a border of 16 pixels was lost, and the prompt has background and
pattern as they were. Beside these it names style and position.
    new       share of these two that are as the prompt says
    kept      share of shirt, background and pattern, or of what the head shows, as in the source
    PSNR      to the source, in dB, where it is kept;  truth  to the picture as it would be drawn, in all
Writes tests/bench/lab_subjects.md.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.lab_tokens import MOVING_CFG as CFG  # noqa: E402
from bench.lab_tokens import SIDE, Moving, lab  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
INTRO = (
    "# Subjects put together on the lab\n\nEach table says by which command it was made; what the columns mean is said "
    f"at the top of `tests/bench/lab_subjects.py`. Euler, cfg {CFG}. The lab proves no looks on other models."
)


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
            x = self.vae.decode(toy.sample(model, CFG, **given)).movedim(-1, 1).float().clamp(0, 1)
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
        self.positive = conditioning(clip, [caption(p, ("style", "position", *self.new)) for p in self.wanted])
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
            x = self.show(toy.sample(model, CFG, **given))
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

    def rows(portraits, seeds, steps):
        for name, (which, options) in settings.items():
            found = [made(portraits, seed, steps, which).figures(*options) for seed in range(seeds)]
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
    ("Two subjects, Lab-DiT (flow)", ("head", "identity", "second", "prompted"), of(Together, TOGETHER)),
    ("A part painted anew, Lab-DiT (flow)", ("new", "kept", "PSNR", "truth"), of(Anew, ANEW)),
)


def main():
    size, numbers = arguments(__doc__, portraits=32, seeds=4, steps=12)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
