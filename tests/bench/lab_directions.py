"""What directions in h-space do to inverted portraits of the lab: Asyrp's, and those that the pullback finds.

    python tests/bench/lab_directions.py [--portraits 32] [--seeds 4] [--steps 20] [--tables 1 2 ...]

Portraits that lack the attribute (no glasses, sad, no hat) are inverted without a prompt and sampled without CFG. Per
strength of a direction, from two prompts or from 12 pairs of other portraits that differ in nothing else:
    shown       share of pictures that show the attribute
    kept        share of all other factors that are as in the portrait
    identity    of the face with the portrait's, a cosine
Per direction of a portrait's own basis at percent 0.35, walked at the node's strength 0.3 both ways:
    h           how far a move by a twentieth of the latent's length takes the h-space, as a share of its own length
    changed     share of factors that the reader sees otherwise than in the picture without the walk
    identity    of the face with that picture's;  PSNR  to it
Other portraits and noises for each seed. Writes the chosen tables into tests/bench/lab_directions.md.
"""

import contextlib
import io
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.lab_guidance import lab, text  # noqa: E402
from bench.lab_hspace import PLAIN, shown  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
EDITS = {  # factor, from, to, prompts of both
    "glasses": ("glasses", "no glasses", "glasses", "no glasses", "glasses"),
    "happy": ("expression", "sad", "happy", "a sad person", "a happy person"),
    "crown": ("hat", "no hat", "crown", "no hat", "a crown"),
}
PAIRS, PERCENT, STRENGTH, END = 12, 0.35, 0.3, 0.9


@cache
def levels(steps):
    import toy

    return toy.sigmas(lab()[0][0], steps, "normal")


def drawn(factor, value, count, first):
    """(portraits with that value, their latents)."""
    import numpy as np
    import torch
    from steer.models.lab import data
    from steer.models.lab.portrait import draw

    portraits = [replace(p, **{factor: value}) for p in data.held_out(count, first)[0]]
    with torch.inference_mode():
        return portraits, lab()[0][2].encode(torch.from_numpy(np.stack([draw(p) for p in portraits])).float() / 255)


@cache
def inverted(factor, value, count, seed, steps):
    """(portraits, latents, trajectory), without a prompt."""
    import torch
    from steer.patches.inversion.invert import invert

    portraits, latent = drawn(factor, value, count, 7000 + 200 * seed)
    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        return portraits, latent, invert(lab()[0][0], text(""), latent, levels(steps), "fixed-point", 2)


@cache
def direction(attribute, way, seed, steps, cfg=3.0):
    """The `Direction` to an attribute."""
    import torch
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
    from steer.patches.hspace import direction

    factor, before, after, *prompts = EDITS[attribute]
    model, noise = lab()[0][0], Noise_RandomNoise(seed)
    with torch.inference_mode():
        if way == "prompts":
            empty = {"samples": torch.zeros(PAIRS, 4, 16, 16)}
            less, more = map(text, prompts)
            return direction.of_prompts(model, more, less, noise, empty, levels(steps), cfg)
        has, lacks = ({"samples": drawn(factor, value, PAIRS, 9000 + 200 * seed)[1]} for value in (after, before))
        return direction.of_pictures(model, text(""), noise, has, lacks, levels(steps))


def sample(model, start, latent, sigmas, way):
    """Pictures, without prompt and CFG."""
    import comfy.samplers
    import torch

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(text(""), text(""))
    guider.set_cfg(1.0)
    with torch.inference_mode():
        return shown(guider.sample(start, latent, way, sigmas, seed=0, disable_pbar=True))


def moved(attribute, way, strength, portraits, seed, steps, end=END, euler=False):
    """Pictures of the portraits without the attribute, with a direction."""
    import comfy.samplers
    from steer.patches.hspace import asymmetricsampler, asyrp
    from steer.patches.inversion.invert import InvertedNoise
    from steer.patches.shared.schedule import Schedule

    factor, before, *_ = EDITS[attribute]
    _, latent, path = inverted(factor, before, portraits, seed, steps)
    model = asyrp.apply(lab()[0][0], direction(attribute, way, seed, steps), strength, Schedule(0.0, end))
    sampler = comfy.samplers.sampler_object("euler") if euler else asymmetricsampler.sampler(**PLAIN)
    start = InvertedNoise(path, model).generate_noise({"samples": latent})
    return sample(model, start, latent, path.sigmas, sampler)


def measure(x, attribute, portraits, seed, steps):
    import torch
    from steer.models.lab.evaluate import hits
    from steer.models.lab.portrait import FACTORS

    factor, before, after, *_ = EDITS[attribute]
    people, latent, _ = inverted(factor, before, portraits, seed, steps)
    place, reader = list(FACTORS).index(factor), lab()[1]
    after = [replace(p, **{factor: after}) for p in people]
    right = hits(reader, x, after)
    others = [i for i in range(len(FACTORS)) if i != place]
    with torch.no_grad():
        face, own = (reader(side)[2] for side in (x, shown(latent)))
    return {
        "shown": float(right[:, place].float().mean()),
        "kept": float(right[:, others].float().mean()),
        "identity": float((face * own).sum(1).mean()),
    }


def mean(found):
    return {name: sum(figures[name] for figures in found) / len(found) for name in found[0]}


def over(attribute, settings):
    """Rows of a table: settings {name: (way, strength, options)}."""

    def rows(portraits, seeds, steps):
        for name, (way, s, options) in settings.items():
            sizes = [dict(portraits=portraits, seed=seed, steps=steps) for seed in range(seeds)]
            yield name, mean([measure(moved(attribute, way, s, **z, **options), attribute, **z) for z in sizes])

    return rows


STRENGTHS = {"strength 0": ("prompts", 0.0, {})} | {
    f"{way}, strength {s:g}": (way, s, {}) for way in ("prompts", "pictures") for s in (0.5, 1.0, 2.0, 4.0)
}
WAYS = {
    f"prompts, strength {s:g}, {name}": ("prompts", s, options)
    for s in (1.0, 2.0)
    for name, options in (("window to 0.6", {"end": 0.6}), ("euler", {"euler": True}))
}


@cache
def bases(portraits, seed, steps):
    """{name: directions [B, C, H, W] of the portraits, unit length}; the level's number on the trajectory."""
    import torch
    from steer.patches.hspace import pullback

    model, (_, _, path) = lab()[0][0], inverted("hat", "no hat", portraits, seed, steps)
    level = float(model.get_model_object("model_sampling").percent_to_sigma(PERCENT))
    i = int((path.sigmas[:-1] - level).abs().argmin())
    x, sigma, generator = path.latents[i], path.sigmas[i], torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        found = [pullback.local_basis(model, text(""), one[None], sigma).v for one in x]
        exact = [pullback.exact_basis(model, text(""), one[None], sigma, 5).v for one in x]
    fields = pullback.cosines(x.shape[1:], 64)
    smooth = torch.tensordot(torch.randn(len(x), 64, generator=generator), fields, 1)
    noise = torch.randn(x.shape, generator=generator)
    named = {
        "direction 1, power method": torch.stack([v[0] for v in exact]),
        **{f"direction {k}": torch.stack([v[k - 1] for v in found]) for k in (1, 2, 3, 16, 64)},
        "random among the smoothest": smooth,
        "random": noise,
    }
    return {name: v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for name, v in named.items()}, i


def walked(name, portraits, seed, steps):
    """Figures of a direction."""
    import comfy.samplers
    import torch
    from steer.patches.hspace import pullback
    from steer.patches.shared.hspace import block, probe

    model, (_, latent, path) = lab()[0][0], inverted("hat", "no hat", portraits, seed, steps)
    directions, i = bases(portraits, seed, steps)
    x, sigma, v, reader = path.latents[i], path.sigmas[i], directions[name], lab()[1]
    step = 0.05 * x[0].numel() ** 0.5 * pullback.scale(model, sigma)
    with torch.inference_mode():
        pairs = [(x, sigma), (x + step * v, sigma)]
        (h, _), (there, _) = probe(model, text(""), pairs, block(model, "middle"))
    sampling, euler = model.get_model_object("model_sampling"), comfy.samplers.sampler_object("euler")

    def rest(z):
        start = model.model.process_latent_out(sampling.inverse_noise_scaling(sigma, z))
        return sample(model, torch.zeros_like(latent), start, path.sigmas[i:], euler)

    with torch.inference_mode(), torch.no_grad():
        plain = rest(x)
        both = [rest(pullback.walk(model, text(""), x, sigma, v, s, 10)) for s in (STRENGTH, -STRENGTH)]
        read, face = reader(plain)[0], reader(plain)[2]
        changed = [[a.argmax(1) != b.argmax(1) for a, b in zip(reader(y)[0], read, strict=True)] for y in both]
        near = [-10 * (y - plain).square().flatten(1).mean(1).log10() for y in both]
        same = [(reader(y)[2] * face).sum(1) for y in both]
    return {
        "h": float(((there - h).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)).mean()),
        "changed": float(torch.stack([torch.stack(each) for each in changed]).float().mean()),
        "identity": float(torch.stack(same).mean()),
        "PSNR": float(torch.stack(near).mean()),
    }


def walks(portraits, seeds, steps):
    for name in bases(portraits, 0, steps)[0]:
        yield name, mean(list(map(partial(walked, name, portraits, steps=steps), range(seeds))))


COLUMNS = ("shown", "kept", "identity")
TABLES = (
    *((f"Asyrp to {attribute}, Lab-UNet", COLUMNS, over(attribute, STRENGTHS)) for attribute in EDITS),
    ("Asyrp to glasses, other ways to sample, Lab-UNet", COLUMNS, over("glasses", WAYS)),
    ("Pullback, Lab-UNet", ("h", "changed", "identity", "PSNR"), walks),
)
INTRO = (
    "# What directions in h-space do on the lab\n\nEach table says by which command it was made; what the columns mean "
    "is said at the top of `tests/bench/lab_directions.py`. The lab proves the implementation, not the looks on other "
    "models."
)


def main():
    size, numbers = arguments(__doc__, portraits=32, seeds=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
