"""What InjectFusion does on the lab: whose attributes a picture shows that is started from one portrait and gets the
h-space of another.

    python tests/bench/lab_hspace.py [--portraits 32] [--seeds 4] [--steps 20] [--tables 1 2 3]

Both portraits are inverted without a prompt, as the paper's models have none, and sampled without CFG.
    content, original   share of pictures that show the value of the content portrait, or of the original, where the two
                        differ (the rest shows neither)
    face                how far the face's geometry has gone from the original (0) to the content (1)
    FD                  Frechet distance to drawn portraits in the reader's features: lower is more real
    ID                  cosine of the reader's identity with the content's
    Gram                distance of the Gram matrices of the reader's first layers to the original's, in hundredths
Writes the chosen tables into tests/bench/lab_hspace.md.
"""

import contextlib
import io
import sys
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_name("lab_hspace.md")
CONTENT, ORIGINAL = ("expression", "glasses"), ("hair_color", "shirt", "background")
END = 0.85  # of the window, where the lab takes the content over; the paper's 0.6 is in the table


@cache
def pairs(count, steps, seed=0):
    """Originals, contents: portraits, pictures as the VAE shows them, latents, trajectories; and the sigmas."""
    import comfy.samplers
    import torch
    from bench.lab_guidance import lab
    from steer.models.lab import data
    from steer.models.lab.evaluate import conditioning
    from steer.patches.inversion.invert import invert

    model, clip, vae = lab()[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    sides = []
    for first in (7000 + seed, 8000 + seed):
        portraits, pictures = data.held_out(count, first)
        with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
            latent = vae.encode(torch.from_numpy(pictures).float() / 255)
            path = invert(model, conditioning(clip, [""] * count), latent, sigmas, "fixed-point", 2)
            sides.append((portraits, shown(latent), latent, path))
    return *sides, sigmas


def shown(latent):
    from bench.lab_guidance import lab

    return lab()[0][2].decode(latent).movedim(-1, 1).float().clamp(0, 1)


def inject(size, gamma, mode="slerp", sampler=None, end=END, layers="middle"):
    """Pictures of `pairs(*size)`, [count, 3, 128, 128]. sampler: options of the asymmetric one; None for euler."""
    import comfy.samplers
    import torch
    from bench.lab_guidance import lab, text
    from steer.patches.hspace import asymmetricsampler, injectfusion
    from steer.patches.inversion.invert import InvertedNoise
    from steer.patches.shared.schedule import Schedule

    (_, _, latent, path), (*_, content), sigmas = pairs(*size)
    model = lab()[0][0]
    noise = InvertedNoise(path, model).generate_noise({"samples": latent})
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(injectfusion.apply(model, content, gamma, Schedule(0.0, end), mode, layers))
        guider.set_conds(text(""), text(""))
        guider.set_cfg(1.0)
        way = comfy.samplers.sampler_object("euler") if sampler is None else asymmetricsampler.sampler(**sampler)
        return shown(guider.sample(noise, latent, way, sigmas, seed=0, disable_pbar=True))


def gram(x):
    """Gram matrices of the reader's first four layers, each [B, C C]."""
    from bench.lab_guidance import lab

    found, h = [], x * 2 - 1
    for layer in list(lab()[1].trunk)[:4]:
        h = layer(h)
        f = h.flatten(2)
        found.append((f @ f.transpose(1, 2) / f[0].numel()).flatten(1))
    return found


def measure(x, size):
    """Figures of pictures x, one for each of `pairs(*size)`; "shares" holds {factor: (content, original)}."""
    import torch
    from bench.lab_guidance import lab
    from steer.models.lab.evaluate import shown as shares

    (first, drawn, *_), (second, given, *_), _ = pairs(*size)
    reader = lab()[1]
    with torch.no_grad():
        table = shares(reader, x, second, first)
        _, geometry, identity = reader(x)
        a, b = (reader(side)[1] for side in (drawn, given))
        way = ((geometry - a) * (b - a)).sum(1) / (b - a).square().sum(1)
        matrices = zip(gram(x), gram(drawn), strict=True)
        return {
            "shares": table,
            "content": sum(table[name][0] for name in CONTENT) / len(CONTENT),
            "original": sum(table[name][1] for name in ORIGINAL) / len(ORIGINAL),
            "face": float(way.mean()),
            "ID": float((identity * reader(given)[2]).sum(1).mean()),
            "Gram": 100 * float(sum((p - q).square().sum(1).sqrt().mean() for p, q in matrices)),
        }


@cache
def over_seeds(name, portraits, seeds, steps):
    """`measure` of a setting, averaged over other pairs for each seed, and the FD of all of their pictures."""
    import torch
    from bench.lab_guidance import features, frechet, real

    sizes = [(portraits, steps, 200 * seed) for seed in range(seeds)]
    made = [inject(size, **SETTINGS[name]) for size in sizes]
    each = [measure(x, size) for x, size in zip(made, sizes, strict=True)]
    shares = [figures.pop("shares") for figures in each]
    mean = {name: sum(figures[name] for figures in each) / seeds for name in each[0]}
    mean["shares"] = {name: [sum(s[name][i] for s in shares) / seeds for i in (0, 1)] for name in shares[0]}
    return {**mean, "FD": frechet(features(torch.cat(made)), real())}


PLAIN, CALIBRATED = (dict(calibration=c, omega=0.3, boost=1.0) for c in (False, True))
WAYS = [
    ("original, back from its noise", dict(gamma=0.0)),
    ("replacement", dict(gamma=1.0, mode="replace", sampler=PLAIN)),
    ("addition, gamma 0.6", dict(gamma=0.6, mode="add", sampler=PLAIN)),
    ("Lerp, gamma 0.6", dict(gamma=0.6, mode="lerp", sampler=PLAIN)),
    ("Slerp, gamma 0.6", dict(gamma=0.6, sampler=PLAIN)),
    ("Slerp, gamma 0.6, calibration", dict(gamma=0.6, sampler=CALIBRATED)),
    ("Slerp, gamma 0.6, boost from 0.8", dict(gamma=0.6, sampler={**PLAIN, "boost": 0.8})),
    ("Slerp, gamma 0.6, euler", dict(gamma=0.6)),
    ("Slerp, gamma 0.6, window to 0.6", dict(gamma=0.6, sampler=PLAIN, end=0.6)),
    ("Slerp, gamma 0.6, output.0 too", dict(gamma=0.6, sampler=PLAIN, layers="middle, output.0")),
    ("Slerp, gamma 0.6, output.0 too, calibration", dict(gamma=0.6, sampler=CALIBRATED, layers="middle, output.0")),
]
CURVE = [(f"{gamma:g}", dict(gamma=gamma, sampler=PLAIN)) for gamma in (0.2, 0.4, 0.6, 0.8, 1.0)]
SETTINGS = dict(WAYS + CURVE)


def attributes(**size):
    shares = over_seeds("Slerp, gamma 0.6", **size)["shares"]
    for name, (content, original) in shares.items():
        yield name, {"content": f"{100 * content:.0f} %", "original": f"{100 * original:.0f} %"}


def named(settings):
    return lambda **size: ((name, over_seeds(name, **size)) for name, _ in settings)


COLUMNS = ("content", "original", "face", "FD", "ID", "Gram")
TABLES = (
    ("Ways to inject", COLUMNS, named(WAYS)),
    ("Over gamma, Slerp", COLUMNS, named(CURVE)),
    ("Whose attribute shows, Slerp, gamma 0.6", ("content", "original"), attributes),
)
INTRO = (
    "# What InjectFusion does on the lab\n\nEach table says by which command it was made; what the columns mean is "
    "said at the top of `tests/bench/lab_hspace.py`. The lab is a small latent model of 128x128 drawings, where the "
    "paper has pixel models of photographs: orderings can be compared, numbers cannot."
)


def main():
    size, numbers = arguments(__doc__, portraits=32, seeds=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
