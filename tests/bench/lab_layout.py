"""Looks kept while the layout changes, the layout while looks change, the rest while a part is painted anew: on the
lab's trained models.

    python tests/bench/lab_layout.py [--portraits 32] [--sets 4] [--steps 20] [--tables 1 2 ...]

Held-out portraits, inverted under their captions and drawn again at cfg 2.5 under a prompt that says what is new and
leaves the rest open. Every set has portraits of its own. Share of factors that the reader finds as they should be:
moved   the prompt has another position and names style and expression beside it
    moved     the position
    looks     ten others, as in the source
recoloured   the prompt has other colours of hair, shirt and background and names style, expression and skin beside them
    new       the three colours
    layout    position, shape of the hair, glasses, hat and pattern, as in the source
    geometry  mean error of the six measures of the face, each from -1 to 1
guided, looked at   as recoloured, and drawn from noise of its own, not from the inverted noise; looked at by the
reader, which also measures, or by Lab Vision, which does not
repainted   the prompt has another hair colour, hat or expression, or glasses on or off, and names the style beside it;
the mask is the region where the drawn portraits differ
    edited    the new factor;  others  the rest, as in the source
    outside   PSNR to the source, in dB, outside of the region;  truth  PSNR to the drawn truth
Of all: identity, the similarity of the face to the source's; 1 is the same.
Writes tests/bench/lab_layout.md.
"""

import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.lab_editing import figures, redraw, with_outside  # noqa: E402
from bench.lab_inversion_edit import CFG, Case  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
FROM_NOISE = ("guided", "looked at")
COLOURS = ("hair_color", "shirt", "background")
SHAPES = ("position", "hair_style", "glasses", "hat", "pattern")
INTRO = (
    "# Layout and looks, on the lab\n\nEach table says by which command it was made; what the columns mean is said at "
    f"the top of `tests/bench/lab_layout.py`. Cfg {CFG}, euler, from the inverted noise, except for what is guided or "
    "looked at."
)


class Layout(Case):
    """Portraits with another position, or other colours: `edits` and their short prompts `after`."""

    def __init__(self, which, portraits, first, change):
        import torch
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning
        from steer.models.lab.load import load_clip
        from steer.models.lab.portrait import FACTORS, GEOMETRY

        super().__init__(which, portraits, first)
        self.name, self.change = change, ("position",) if change == "moved" else COLOURS
        if change == "repainted":
            pairs = zip(self.edits, self.factors, strict=True)
            self.after = conditioning(load_clip(which), [caption(e, ("style", factor)) for e, factor in pairs])
            with_outside(self)
            return

        def other(name, value):
            values = FACTORS[name]
            return values[(values.index(value) + 1) % len(values)]

        self.edits = [replace(p, **{n: other(n, getattr(p, n)) for n in self.change}) for p in self.sources]
        named = ("style", "expression", *self.change, *(() if change == "moved" else ("skin",)))
        self.after = conditioning(load_clip(which), [caption(e, named) for e in self.edits])
        self.shape = torch.tensor([[getattr(p, name) for name in GEOMETRY] for p in self.sources])
        self.kept = SHAPES if self.change == COLOURS else tuple(name for name in FACTORS if name != "position")

    def masks(self):
        """Of the head, [B, H, W], in the sources and where it shall be."""
        import numpy as np
        import torch
        from steer.models.lab.portrait import draw_masks

        return [
            torch.from_numpy(np.stack([1 - draw_masks(p)["background"] for p in people]))
            for people in (self.sources, self.edits)
        ]

    def measure(self, latent):
        import torch

        if self.name == "repainted":
            found = figures(self, latent)
            return {**found, "others": found["kept"]}
        with torch.inference_mode():
            x = self.show(latent)
            read, (_, shape, face) = self.reader.read(x), self.reader(x)

        def share(names):
            found = [[r[name][0] == getattr(e, name) for name in names] for r, e in zip(read, self.edits, strict=True)]
            return torch.tensor(found).float().mean(1)

        identity, geometry = (face * self.faces).sum(1), (shape - self.shape).abs().mean(1)
        if self.name == "moved":
            return {"moved": share(self.change), "looks": share(self.kept), "identity": identity}
        return {
            "new": share(self.change), "layout": share(self.kept), "geometry": geometry, "identity": identity,
        }


@cache
def layout(which, portraits, first, change):
    return Layout(which, portraits, first, change)


def masactrl(lab, path, layers="auto", start=0.08, masked=False):
    from steer.patches.attention import masactrl as method
    from steer.patches.shared.schedule import Schedule

    there, here = lab.masks() if masked else (None, None)
    return method.apply(lab.model, path, 1.0, layers, Schedule(start, 1.0), None, there, here)


def plugandplay(lab, path, layers="auto", end=0.5, features="auto", features_end=0.8):
    from steer.patches.attention import plugandplay as method
    from steer.patches.shared.schedule import Schedule

    return method.apply(lab.model, path, layers, Schedule(0.0, end), features, Schedule(0.0, features_end))


def freecontrol(lab, path, strength=1.0, components=64, layers="auto", method="subspace", end=0.6):
    from steer.patches.attention import freecontrol as node
    from steer.patches.shared.schedule import Schedule

    return node.apply(lab.model, path, strength, components, layers, method, Schedule(0.0, end))


def diffuseit(lab, path, strength=1.0, end=0.9, eye="reader"):
    """Looked at by the lab's reader, which also measures, or by its CLIP_VISION, which does not."""
    from steer.models.lab.load import load_vision
    from steer.nodes.lab.scorer import LabScorer
    from steer.patches.attention import diffuseit as node
    from steer.patches.shared.decode import decoder
    from steer.patches.shared.schedule import Schedule

    eyes = load_vision() if eye == "vision" else LabScorer("a happy person", decoder(lab.vae), lab.reader)
    source = lab.source.movedim(1, -1)
    return node.apply(lab.model, lab.vae, source, strength, 1.0, 1.0, Schedule(0.0, end), eyes)


def region(lab):
    """Where source and drawn truth differ, [B, H, W]: what a user would paint."""
    return 1 - lab.outside[:, 0]


def kvreuse(lab, path, bonus=0.0, alone=False, **options):
    """alone: without a look at the source."""
    from steer.patches.attention import kvreuse as method
    from steer.patches.shared.schedule import Schedule

    return method.apply(lab.model, path, region(lab), bonus, "auto", Schedule(0.0, 0.0 if alone else 1.0), **options)


MOVED = {  # setting: (models, options of masactrl)
    "re-prompt, same noise": (("unet", "dit"), None),
    "MasaCtrl": (("unet", "dit"), {}),
    "MasaCtrl from 30 %": (("unet", "dit"), {"start": 0.3}),
    "MasaCtrl, masks drawn": (("unet", "dit"), {"masked": True}),
    "MasaCtrl, output.2-3": (("unet",), {"layers": "output.2-3"}),
    "MasaCtrl, output.0-1": (("unet",), {"layers": "output.0-1"}),
    "MasaCtrl, single.2-4": (("dit",), {"layers": "single.2-4"}),
    "MasaCtrl, all layers": (("dit",), {"layers": "0%-100%"}),
}
RECOLOURED = {
    "re-prompt, same noise": (("unet", "dit"), None),
    "Plug-and-Play": (("unet", "dit"), {}),
    "q and k alone": (("unet",), {"features_end": 0.0}),
    "features alone": (("unet",), {"end": 0.0}),
    "q and k to 80 %": (("unet", "dit"), {"end": 0.8}),
    "q and k in all layers": (("unet", "dit"), {"layers": "0%-100%"}),
}


REPAINTED = {
    "re-prompt, same noise": (("unet", "dit"), None),
    "Keep Region": (("unet", "dit"), {"alone": True}),
    "KV Reuse": (("unet", "dit"), {}),
    "KV Reuse, attention scale 1": (("unet", "dit"), {"bonus": 1.0}),
    "KV Reuse, attention scale -1": (("unet", "dit"), {"bonus": -1.0}),
    "Keep Region, re_init": (("unet", "dit"), {"alone": True, "re_init": True}),
    "KV Reuse, re_init": (("unet", "dit"), {"re_init": True}),
}
GUIDED = {
    "prompt alone": (("unet", "dit"), None),
    "FreeControl, subspace": (("unet", "dit"), {}),
    "subspace, 8 axes": (("unet", "dit"), {"components": 8}),
    "subspace, 24 axes": (("unet", "dit"), {"components": 24}),
    "subspace, all axes": (("unet", "dit"), {"components": 999}),
    "FreeControl, gradient": (("unet", "dit"), {"method": "gradient"}),
    "gradient, 8 axes": (("unet",), {"method": "gradient", "components": 8}),
    "gradient, strength 3": (("unet", "dit"), {"method": "gradient", "strength": 3.0}),
    "gradient, to 40 %": (("unet",), {"method": "gradient", "end": 0.4}),
}
LOOKED_AT = {
    "prompt alone": (("unet", "dit"), None),
    "DiffuseIT": (("unet", "dit"), {}),
    "DiffuseIT, strength 0.3": (("unet",), {"strength": 0.3}),
    "DiffuseIT, strength 2": (("unet",), {"strength": 2.0}),
    "by Lab Vision": (("unet", "dit"), {"eye": "vision"}),
    "by Lab Vision, strength 2": (("unet", "dit"), {"eye": "vision", "strength": 2.0}),
}
METHODS = {
    "moved": (MOVED, masactrl),
    "recoloured": (RECOLOURED, plugandplay),
    "repainted": (REPAINTED, kvreuse),
    "guided": (GUIDED, freecontrol),
    "looked at": (LOOKED_AT, diffuseit),
}


def measured(which, change, portraits, sets, steps):
    """Rows of one table."""
    import torch
    from bench.lab_editing import trajectory

    settings, method = METHODS[change]
    seeds = [n if change in FROM_NOISE else None for n in range(sets)]
    labs = [layout(which, portraits, 9000 + 1000 * n, change) for n in range(sets)]
    for name, (models, options) in settings.items():
        if which in models:
            found = [
                row(lab, steps, method, options, None if method is diffuseit else trajectory(lab, steps), seed)
                for lab, seed in zip(labs, seeds, strict=True)
            ]
            yield name, {column: float(torch.cat([each[column] for each in found]).mean()) for column in found[0]}


def row(lab, steps, method, options, path, seed=None):
    """The figures of one setting; a seed is of noise to start from in place of the inverted."""
    model = lab.model if options is None else method(lab, path, **options)
    if seed is None:
        return lab.measure(redraw(lab, steps, model))
    return lab.measure(lab.sample(model, lab.after, "euler", lab.sigmas(steps), start=lab.noise(seed)))


COLUMNS = {
    "moved": ("moved", "looks", "identity"),
    "recoloured": ("new", "layout", "geometry", "identity"),
    "repainted": ("edited", "others", "outside", "truth", "identity"),
    "guided": ("new", "layout", "geometry", "identity"),
    "looked at": ("new", "layout", "geometry", "identity"),
}
NAMES = {"unet": "Lab-UNet", "dit": "Lab-DiT"}
TABLES = [
    (f"{change.capitalize()}, {NAMES[which]}", columns, partial(measured, which, change))
    for change, columns in COLUMNS.items() for which in NAMES
]


def main():
    size, numbers = arguments(__doc__, portraits=32, sets=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
