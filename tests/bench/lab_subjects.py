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


HEAD = ("expression", "skin", "hair_style", "hair_color", "glasses", "hat")
GROUND = ("background", "pattern")


def portraits_from(first, count, **fixed):
    from steer.models.lab import data
    from steer.models.lab.portrait import Portrait

    first += data.HELD_OUT
    return [Portrait.from_seed(seed, position="center", **fixed) for seed in range(first, first + count)]


def pictures(people):
    """[n, h, w, 3] in 0..1."""
    import numpy as np
    import torch
    from steer.models.lab.portrait import draw

    return torch.from_numpy(np.stack([draw(p) for p in people])).float() / 255


def other(name, *taken):
    """A value of a factor that is none of those."""
    from steer.models.lab.portrait import FACTORS

    return next(value for value in FACTORS[name] if value not in taken)


class Scene:
    """Pictures of portraits as `wanted`, from noise, by a prompt that names style, place and what is `told`."""

    def __init__(self, wanted, told, seed, steps):
        import torch
        import toy
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning

        self.model, self.clip, self.vae, self.reader = lab("dit")
        self.wanted, self.sigmas = wanted, toy.sigmas(self.model, steps, "simple")
        start = torch.randn(len(wanted), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        texts = [caption(p, ("style", "position", *told)) for p in wanted], [""] * len(wanted)
        positive, negative = (conditioning(self.clip, text) for text in texts)
        self.given = dict(positive=positive, negative=negative, start=start, sigmas=self.sigmas)

    show = Moving.show

    def inverted(self, images, people):
        """The trajectory of pictures of portraits, under their captions."""
        import torch
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning
        from steer.patches.inversion.invert import invert

        with torch.inference_mode():
            text = conditioning(self.clip, [caption(p) for p in people])
            return invert(self.model, text, self.vae.encode(images), self.sigmas, "fixed-point")

    def put(self, model, path, mask, threshold, strength):
        from steer.patches.shared.schedule import Schedule
        from steer.patches.tokens import personalizeanything

        return personalizeanything.apply(model, path, mask, threshold, strength, Schedule())

    def draw(self, model):
        """(pictures [n, 3, h, w], what the reader says of them, their faces)."""
        import torch
        import toy

        with torch.inference_mode():
            x = self.show(toy.sample(model, CFG, **self.given))
            return x, self.reader.read(x), self.reader(x)[2]

    def share(self, read, names):
        """Of the factors `names` that are as wanted."""
        right = [r[n][0] == getattr(p, n) for r, p in zip(read, self.wanted, strict=True) for n in names]
        return sum(right) / len(right)


class Together(Scene):
    """The head of one portrait with the body, or on the background, of another."""

    def __init__(self, count, seed, steps, second):
        import numpy as np
        import torch
        from steer.models.lab.portrait import draw_masks

        heads = portraits_from(30000 + 1000 * seed, count)
        others = [portraits_from(30500 + 1000 * seed + n, 1, style=p.style)[0] for n, p in enumerate(heads)]
        self.second, self.asked = (("shirt",), GROUND) if second == "body" else (GROUND, ("shirt",))
        wanted = [
            replace(p, **{n: getattr(o, n) for n in self.second},
                    **{n: other(n, getattr(p, n), getattr(o, n)) for n in self.asked})
            for p, o in zip(heads, others, strict=True)
        ]
        super().__init__(wanted, self.asked, seed, steps)

        def part(people, what):
            masks = [draw_masks(p) for p in people]
            masks = [1 - m["head"] - m["background"] if what == "body" else m[what] for m in masks]
            return self.inverted(pictures(people), people), torch.from_numpy(np.stack(masks))

        self.parts = part(others, second), part(heads, "head")
        with torch.inference_mode():
            self.faces = self.reader(pictures(heads).movedim(-1, 1))[2]

    def figures(self, threshold, strength):
        """{column: mean over the pictures}."""
        model = self.model
        for path, mask in self.parts:
            model = self.put(model, path, mask, threshold, strength)
        _, read, face = self.draw(model)
        found = {"head": HEAD, "second": self.second, "prompted": self.asked}
        identity = float((face * self.faces).sum(1).mean())
        return {"identity": identity, **{column: self.share(read, names) for column, names in found.items()}}


class Anew(Scene):
    """Portraits of which a part is lost or shall be another, inverted as they are."""

    def __init__(self, count, seed, steps, where):
        import numpy as np
        import torch
        from steer.models.lab.portrait import draw_masks

        people = wanted = portraits_from(40000 + 1000 * seed, count)
        images = pictures(people)
        if where == "inside":
            self.new, self.old = ("hat", "expression"), ("shirt", *GROUND)
            wanted = [replace(p, **{n: other(n, getattr(p, n)) for n in self.new}) for p in people]
            heads = [[draw_masks(each)["head"] for each in pair] for pair in zip(people, wanted, strict=True)]
            self.kept = 1 - torch.from_numpy(np.array(heads)).amax(1)
        else:
            self.new, self.old = GROUND, HEAD
            self.kept = torch.zeros(count, SIDE, SIDE)
            self.kept[:, 16:-16, 16:-16] = 1.0
            images = torch.where(self.kept[..., None] > 0.5, images, 0.5)
        super().__init__(wanted, self.new, seed, steps)
        self.truth, self.path = pictures(wanted).movedim(-1, 1), self.inverted(images, people)
        with torch.inference_mode():
            self.source = self.show(self.vae.encode(images))

    def figures(self, threshold, strength, region=False):
        """{column: mean over the pictures}; region: Keep Region beside it."""
        import torch
        from steer.patches.inversion import keepregion
        from steer.patches.shared.schedule import Schedule

        model = self.put(self.model, self.path, self.kept, threshold, strength)
        if region:
            model = keepregion.apply(model, 1 - self.kept, self.path, 0, False, Schedule())
        x, read, _ = self.draw(model)

        def psnr(truth, where):
            error = ((x - truth).square().mean(1) * where).sum((1, 2)) / where.sum((1, 2))
            return float(-10 * error.log10().mean())

        return {
            "new": self.share(read, self.new), "kept": self.share(read, self.old),
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
