"""What style injection takes from the style and keeps of the content, on the lab's UNet.

    python tests/bench/lab_style.py [--portraits 8] [--sets 4] [--steps 10] [--tables 1]

Held-out portraits, each in the style of its neighbour in the set, inverted and drawn without a prompt at cfg 1; beside
it three ways that are told the neighbour's colours by a prompt, at cfg 2.5:
    palette    distance of the colours from the style's, wherever they are (sliced Wasserstein, in units of white)
    structure  correlation of light and dark with the content
    layout     share of position, hat, glasses, hair style and expression that the reader finds as in the content, of
               those in which the two differ
    colours    share of skin, hair, shirt and background that it finds as in the style, likewise
Writes tests/bench/lab_style.md.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.lab_editing import redraw  # noqa: E402
from bench.lab_inversion_edit import case, flowedit, sdedit  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
INTRO = (
    "# Style injection on the lab\n\nThe table says by which command it was made; what the columns mean is said at the "
    "top of `tests/bench/lab_style.py`. Euler, temperature 1.5 where nothing else is said. The lab proves the "
    "implementation, not the looks on other models."
)
LAYOUT = ("position", "hat", "glasses", "hair_style", "expression")
COLOURS = ("skin", "hair_color", "shirt", "background")
OWN, START = "the content's own noise", "AdaIN of the noise"
SETTINGS = [  # name, start, (gamma, temperature, layers) or None
    ("content, drawn again", OWN, None),
    ("AdaIN of the noise alone", START, None),
    *((f"gamma {g}, layers output", START, (g, 1.5, "output")) for g in (1.0, 0.75, 0.5, 0.3, 0.0)),
    ("gamma 0.75, temperature 1", START, (0.75, 1.0, "output")),
    ("gamma 0.75, " + OWN, OWN, (0.75, 1.5, "output")),
    ("gamma 0.75, layers auto", START, (0.75, 1.5, "auto")),
]


def baselines():
    """[(name, edit(a `Case` of the prompts, path, steps, seed) -> latent)]"""
    from bench.lab_editing_settings import last

    def named(name, edit, share):
        edit = last(share, edit)
        return f"{name} by prompt, last {100 * share:.0f} %", lambda lab, path, steps, seed: edit(lab, steps, seed)

    return [
        ("re-prompt, same noise", lambda lab, path, steps, seed: redraw(lab, steps, lab.model, path=path)),
        *(named("SDEdit", sdedit, share) for share in (0.4, 0.6, 0.8)),
        *(named("FlowEdit", flowedit, share) for share in (0.6, 0.8)),
    ]


def neighbours(lab):
    return [lab.sources[-1], *lab.sources[:-1]]


def told(lab):
    """The `Case` with prompts that give each portrait its neighbour's colours."""
    from steer.models.lab.captions import caption
    from steer.models.lab.evaluate import conditioning
    from steer.models.lab.load import load_clip

    lab, pairs = copy.copy(lab), zip(lab.sources, neighbours(lab), strict=True)
    edits = [replace(p, **{name: getattr(other, name) for name in COLOURS}) for p, other in pairs]
    lab.after = conditioning(load_clip(lab.which), [caption(p) for p in edits])
    return lab


def palette(a, b):
    """Sliced Wasserstein distance [B] of the colours of pictures [B, 3, H, W]: where they are does not count."""
    import torch

    directions = torch.nn.functional.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=0)
    a, b = ((x.flatten(2).mT @ directions).sort(1)[0] for x in (a, b))
    return (a - b).abs().mean((1, 2))


def structure(a, b):
    """Correlation [B] of light and dark in pictures [B, 3, H, W]."""
    import torch

    pairs = zip(a.mean(1).flatten(1), b.mean(1).flatten(1), strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


def pictures(lab, steps):
    """(content, style, sigmas): the inverted portraits of a `Case`, and those of their neighbours."""
    import torch
    from steer.patches.inversion.invert import invert
    from steer.patches.shared.trajectory import Trajectory

    sigmas = lab.sigmas(steps)
    with torch.inference_mode():
        content = invert(lab.model, lab.nothing, lab.latent, sigmas, "fixed-point", 3)
    return content, Trajectory(sigmas, content.latents.roll(1, 1), content.model, content.conditioning), sigmas


def drawn(lab, content, style, sigmas, start, settings):
    """Pictures [B, 3, H, W]."""
    import torch
    from steer.patches.attention import styleinjection
    from steer.patches.inversion.invert import InvertedNoise
    from steer.patches.shared.schedule import Schedule

    model, noise = styleinjection.apply(lab.model, content, style, *(settings or (1.0, 1.0, "auto")), Schedule())
    model = model if settings else lab.model
    noise = noise if start == START else InvertedNoise(content, lab.model)
    with torch.inference_mode():
        begin = noise.generate_noise({"samples": lab.latent})
        return lab.show(lab.sample(model, lab.nothing, "euler", sigmas, 1.0, begin))


def shares(read, people, others, factors):
    """Of the factors in which people and others differ, whether the reader finds those of people."""
    pairs = zip(read, people, others, strict=True)
    return [r[f][0] == getattr(p, f) for r, p, o in pairs for f in factors if getattr(p, f) != getattr(o, f)]


def transfers(portraits, sets, steps):
    import torch

    labs = [case("unet", portraits, 7000 + 1000 * n) for n in range(sets)]
    paths, prompted = [pictures(lab, steps) for lab in labs], [told(lab) for lab in labs]
    ways = [(name, lambda n, do=do: labs[n].show(do(prompted[n], paths[n][0], steps, n))) for name, do in baselines()]
    ways += [(name, lambda n, how=how: drawn(labs[n], *paths[n], *how)) for name, *how in SETTINGS]
    for name, way in ways:
        found = {column: [] for column in COLUMNS}
        for n, lab in enumerate(labs):
            with torch.inference_mode():
                x = way(n)
                read = lab.reader.read(x)
            others = neighbours(lab)
            found["palette"] += palette(x, lab.source.roll(1, 0)).tolist()
            found["structure"] += structure(x, lab.source).tolist()
            found["layout"] += shares(read, lab.sources, others, LAYOUT)
            found["colours"] += shares(read, others, lab.sources, COLOURS)
        yield name, {column: sum(values) / len(values) for column, values in found.items()}


COLUMNS = ("palette", "structure", "layout", "colours")
TABLES = [("Style injection, Lab-UNet (eps)", COLUMNS, transfers)]


def main():
    size, numbers = arguments(__doc__, portraits=8, sets=4, steps=10)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".3g")


if __name__ == "__main__":
    main()
