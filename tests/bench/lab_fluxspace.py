"""What FluxSpace adds, and what it keeps, on the lab's DiT.

    python tests/bench/lab_fluxspace.py [--portraits 8] [--seeds 2] [--steps 10] [--tables 1 2]

From noise, under captions of held-out portraits that say nothing of the attribute (glasses, a crown, sad in turn). Per
setting, over portraits, seeds and attributes:
    edited    share of pictures in which the reader finds the attribute
    kept      share of the other factors that the reader finds as in the picture without the edit
    identity  similarity of the face to that picture's, 1 is the same
    PSNR      to that picture, in dB
Re-prompting is the caption with the attribute from the same noise. The second table is of portraits that were inverted
under such a caption (fixed-point), about half of them with glasses, and are drawn again at cfg 1, with glasses put in;
there the comparison is with the portrait. Writes tests/bench/lab_fluxspace.md.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS, CFG = Path(__file__).with_suffix(".md"), 3.0
EDITS = (("glasses", "glasses", "glasses"), ("hat", "crown", "a crown"), ("expression", "sad", "sad"))
COLUMNS = ("edited", "kept", "identity", "PSNR")
INTRO = (
    "# FluxSpace on the lab\n\nThe table says by which command it was made; what the columns mean is said at the top "
    f"of `tests/bench/lab_fluxspace.py`. Cfg {CFG}, euler. The lab proves the implementation, not the looks on other "
    "models."
)
SETTINGS = [  # name, (fine, coarse, tau, start)
    *((f"fine {fine}, tau 0.5", (fine, 0.0, 0.5, 0.07)) for fine in (0.5, 1.0, 2.0, 5.0)),
    ("fine 1, tau 0", (1.0, 0.0, 0.0, 0.07)),
    ("fine 1, tau 0.9", (1.0, 0.0, 0.9, 0.07)),
    ("fine 1, tau 0.5, from 0.3 on", (1.0, 0.0, 0.5, 0.3)),
    ("coarse 1", (0.0, 1.0, 0.5, 0.07)),
]


@cache
def lab(portraits, edit):
    """What the pictures of one edit are drawn from."""
    from steer.models.lab import data
    from steer.models.lab.captions import caption
    from steer.models.lab.evaluate import conditioning
    from steer.models.lab.load import load_model
    from steer.models.lab.portrait import FACTORS
    from steer.models.lab.reader import load_reader

    (model, clip, vae), (factor, value, words) = load_model("dit"), edit
    people, _ = data.held_out(portraits, 7000)
    rest = tuple(name for name in FACTORS if name != factor)
    before = conditioning(clip, [caption(p, rest) for p in people])
    after = conditioning(clip, [caption(replace(p, **{factor: value})) for p in people])
    return model, clip, vae, load_reader(), before, after, conditioning(clip, [""] * portraits), words


def drawn(portraits, edit, seed, steps, settings=None, again=False):
    """Pictures [B, 3, H, W]. settings: of FluxSpace.  again: with the attribute in the prompt."""
    import torch
    import toy
    from steer.patches.attention import fluxspace
    from steer.patches.shared.schedule import Schedule

    model, clip, vae, _, before, after, nothing, words = lab(portraits, edit)
    start = torch.randn(portraits, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    sigmas = toy.sigmas(model, steps, "simple")
    if settings:
        fine, coarse, tau, begin = settings
        texts = fluxspace.texts(clip, words, words.split()[-1])
        model = fluxspace.apply(model, *texts, fine, coarse, tau, "auto", Schedule(begin, 1.0))
    positive = after if again else before
    latent = toy.sample(model, CFG, positive=positive, negative=nothing, start=start, sigmas=sigmas)
    return vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)


def figures(portraits, edit, x, plain):
    """{column: [B]} of edited pictures beside those without the edit."""
    import torch
    from steer.models.lab.portrait import FACTORS

    reader, (factor, value, _) = lab(portraits, edit)[3], edit
    with torch.inference_mode():
        (read, face), (was, its) = ((reader.read(each), reader(each)[2]) for each in (x, plain))
    others = [name for name in FACTORS if name != factor]
    return {
        "edited": [float(r[factor][0] == value) for r in read],
        "kept": [sum(r[f][0] == w[f][0] for f in others) / len(others) for r, w in zip(read, was, strict=True)],
        "identity": (face * its).sum(1).tolist(),
        "PSNR": (-10 * (x - plain).square().flatten(1).mean(1).clamp(min=1e-10).log10()).tolist(),
    }


def edits(portraits, seeds, steps):
    runs = [(edit, seed, drawn(portraits, edit, seed, steps)) for edit in EDITS for seed in range(seeds)]
    ways = [("without", None), ("re-prompting", dict(again=True))]
    ways += [(name, dict(settings=settings)) for name, settings in SETTINGS]
    for name, options in ways:
        found = {column: [] for column in COLUMNS}
        for edit, seed, plain in runs:
            x = plain if options is None else drawn(portraits, edit, seed, steps, **options)
            for column, values in figures(portraits, edit, x, plain).items():
                found[column] += values
        yield name, {column: sum(values) / len(values) for column, values in found.items()}


@cache
def pictures(portraits, first, steps):
    """A `Case` of the lab, the path of its portraits under captions without a word on glasses, and captions with it."""
    import torch
    from bench.lab_inversion_edit import case
    from steer.models.lab.captions import caption
    from steer.models.lab.evaluate import conditioning
    from steer.models.lab.load import load_model
    from steer.models.lab.portrait import FACTORS
    from steer.patches.inversion.invert import invert

    it, clip = case("dit", portraits, first), load_model("dit")[1]
    rest = tuple(name for name in FACTORS if name != "glasses")
    with torch.inference_mode():
        before = conditioning(clip, [caption(p, rest) for p in it.sources])
        path = invert(it.model, before, it.latent, it.sigmas(steps), "fixed-point", 3)
    return it, path, conditioning(clip, [caption(p, rest) + ", glasses" for p in it.sources]), clip


def inverted(portraits, first, steps, fine=0.0, again=False):
    """{column: [B]} of portraits drawn from where they were inverted to, with glasses by FluxSpace or by the prompt."""
    import torch
    import toy
    from bench.lab_inversion_edit import psnr
    from steer.models.lab.portrait import FACTORS
    from steer.patches.attention import fluxspace
    from steer.patches.inversion.invert import InvertedNoise
    from steer.patches.shared.schedule import Schedule

    it, path, after, clip = pictures(portraits, first, steps)
    texts = fluxspace.texts(clip, "glasses", "glasses")
    model = fluxspace.apply(it.model, *texts, fine, 0.0, 0.5, "auto", Schedule())
    start = InvertedNoise(path, it.model).generate_noise({"samples": it.latent})
    options = dict(positive=after if again else path.conditioning, negative=it.nothing, latent=it.latent)
    x = it.show(toy.sample(model, 1.0, start=start, sigmas=path.sigmas, **options))
    with torch.inference_mode():
        read, face = it.reader.read(x), it.reader(x)[2]
    others = [name for name in FACTORS if name != "glasses"]
    kept = [sum(r[f][0] == getattr(p, f) for f in others) for r, p in zip(read, it.sources, strict=True)]
    return {
        "edited": [float(r["glasses"][0] == "glasses") for r in read],
        "kept": [n / len(others) for n in kept],
        "identity": (face * it.faces).sum(1).tolist(),
        "PSNR": psnr(x, it.source).tolist(),
    }


def of_pictures(portraits, seeds, steps):
    """Rows; as many sets of portraits as seeds."""
    ways = [("without", {}), ("re-prompting", dict(again=True))]
    ways += [(f"fine {fine}, tau 0.5, from 0 on", dict(fine=fine)) for fine in (0.5, 1.0, 2.0, 5.0)]
    for name, options in ways:
        found = [inverted(portraits, 7000 + 1000 * n, steps, **options) for n in range(seeds)]
        every = {column: [value for each in found for value in each[column]] for column in COLUMNS}
        yield name, {column: sum(values) / len(values) for column, values in every.items()}


def steered(lab, fine, share):
    """(MODEL, CONDITIONING) for the edits of a `Case`: the prompts say nothing of the factor, FluxSpace adds it."""
    import torch
    from steer.models.lab.captions import caption, phrases
    from steer.models.lab.evaluate import conditioning
    from steer.models.lab.load import load_clip
    from steer.models.lab.portrait import FACTORS
    from steer.patches.attention import fluxspace
    from steer.patches.shared.schedule import Schedule

    clip, pairs = load_clip(lab.which), list(zip(lab.edits, lab.factors, strict=True))
    edits = [phrases(p, (factor,))[-1] for p, factor in pairs]
    words = [getattr(p, factor).split()[-1] for p, factor in pairs]
    found = [fluxspace.texts(clip, *each) for each in zip(edits, words, strict=True)]
    texts = conditioning(clip, edits), found[0][1], torch.cat([columns for *_, columns in found])
    model = fluxspace.apply(lab.model, *texts, fine, share, 0.5, "auto", Schedule(0.07, 1.0))
    rest = [caption(p, tuple(name for name in FACTORS if name != factor)) for p, factor in pairs]
    return model, conditioning(clip, rest)


TABLES = [
    ("FluxSpace, Lab-DiT (flow)", COLUMNS, edits),
    ("FluxSpace on inverted portraits, Lab-DiT (flow)", COLUMNS, of_pictures),
]


def main():
    size, numbers = arguments(__doc__, portraits=8, seeds=2, steps=10)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".3g")


if __name__ == "__main__":
    main()
