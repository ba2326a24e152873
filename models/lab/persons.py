"""Two persons in one picture, left and right: what is asked for, and whether each keeps what is its own."""

import functools
import random
from dataclasses import replace

import torch

from . import data, evaluate, likeness, load
from .captions import phrases
from .portrait import FACTORS, SIZE, draw
from .reader import load_reader

SUBJECTS, SAID = "person, person", 2  # words of the prompts below; factors that they say of each


@functools.cache
def cases(count, first=9000):
    """Scenes of portraits that no stage trains on: [(references, portraits as wanted, names of what the prompt says of
    them)] with two each, prompts, pictures of the references [n, 2, 128, 128, 3]."""
    portraits, pictures = data.held_out(2 * count, first)
    rng, scenes, prompts = random.Random(first), [], []
    for pair in zip(portraits[::2], portraits[1::2], strict=True):
        named = [rng.sample(list(FACTORS), SAID) for _ in pair]
        wanted = [replace(p, **{name: rng.choice([v for v in FACTORS[name] if v != getattr(p, name)]) for name in said})
                  for p, said in zip(pair, named, strict=True)]
        scenes.append((pair, wanted, named))
        prompts.append(", ".join(part for p, said in zip(wanted, named, strict=True) for part in phrases(p, said)))
    return scenes, prompts, torch.from_numpy(pictures).float().unflatten(0, (-1, 2)) / 255


@torch.no_grad()
def judge(reader, pictures, scenes, images):
    """Of pictures [n, 3, 128, 256], whose halves are read one by one: shares of factors that show as the prompt says,
    of the others as in a person's own reference, and where the two references differ as in the other's; cosines of the
    faces with both; the share of persons whose face is nearer to their own."""
    n, halves = len(scenes), torch.cat(pictures.clamp(0, 1).chunk(2, -1))
    seen = reader(halves)
    shown = torch.stack([logits.argmax(1) for logits in seen[0]], 1)
    own, wanted = (torch.tensor([scene[which][side].indices for side in (0, 1) for scene in scenes])
                   for which in (0, 1))
    other = own.roll(n, 0)
    said = torch.tensor([[name in scene[2][side] for name in FACTORS] for side in (0, 1) for scene in scenes])
    face = reader(torch.cat((images[:, 0], images[:, 1])).movedim(-1, 1))[2]
    cosine, others = (seen[2] * face).sum(1), (seen[2] * face.roll(n, 0)).sum(1)
    found = {
        "obeyed": (shown == wanted)[said], "taken": (shown == own)[~said],
        "mixed": (shown == other)[~said & (own != other)], "identity": cosine, "other's": others,
        "nearer": cosine > others,
    }
    return {name: float(value.float().mean()) for name, value in found.items()}


def drawn(reader, models, case, steer=None, seeds=1, first=0, **options):
    """`judge` of what models (MODEL, CLIP, VAE) draw one by one, on average over seeds; the pictures of the last.

    steer(prompt, pictures [2, h, w, 3]) -> what `evaluate.sample_noise` takes.
    """
    scenes, prompts, images = case
    given = [None if steer is None else steer(text, pair) for text, pair in zip(prompts, images, strict=True)]
    rows = []
    for seed in range(first, first + seeds):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), 4, SIZE // 8, SIZE // 4, generator=generator).split(1)
        made = torch.cat([evaluate.sample_noise(models, [text], part, steer=by, **options)
                          for text, part, by in zip(prompts, noise, given, strict=True)])
        rows.append(judge(reader, made, scenes, images))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, made


def by_words(models, merge, file="adapter_fastcomposer.safetensors"):
    """steer of `drawn`: the lab's FastComposer; merge: share of the sampling range that sees the prompt alone."""
    from ...patches.identity import fastcomposer
    from ..identity import adapter

    made = adapter.load(str(load.WEIGHTS / file))

    def steer(text, pictures):
        def steered(model, positive, negative):
            model, _, positive = fastcomposer.apply(model, models[1], made, pictures, text, SUBJECTS, merge)
            return model, positive, negative

        return steered

    return steer


def by_regions(models, place=None):
    """steer of `drawn`: each person's words in their half, and the face there by place(picture, MASK, side), if given,
    which gives what `evaluate.sample_noise` takes."""
    from ...patches.shared.schedule import Schedule
    from ...patches.tokens import regions

    left = torch.zeros(1, SIZE, 2 * SIZE)
    left[..., :SIZE] = 1.0
    masks = left, 1 - left

    def steer(text, pictures):
        parts = text.split(", ")
        second = [n for n, part in enumerate(parts) if "person" in part][1]
        words = ", ".join(parts[:second]), ", ".join(parts[second:])

        def steered(model, positive, negative):
            given = list(zip(words, masks, strict=True))
            model, positive = regions.apply(model, models[1], text, given, 1.0, "auto", "auto", Schedule())
            made = model, positive, negative
            for side, mask in enumerate(masks if place else ()):
                made = place(pictures[side][None], mask, side)(*made)
            return made

        return steered

    return steer


def truth(reader, vae, case):
    """`judge` of the wanted portraits, drawn and sent through the VAE: what can be reached."""
    scenes, _, images = case
    x = torch.stack([torch.cat([torch.from_numpy(draw(p).copy()) for p in wanted], 1) for _, wanted, _ in scenes])
    with torch.inference_mode():
        x = vae.decode(vae.encode(x.float() / 255)).movedim(-1, 1).float()
    return judge(reader, x, scenes, images)


def with_faces(which, count, **options):
    """{setting: `judge`} of two persons by their words alone, by words in regions, and by a face each beside these:
    InstantID on the Lab-UNet, PuLID on the Lab-DiT; and what can be reached."""
    reader, models, case = load_reader(), load.load_model(which), cases(count)

    def place(picture, mask, side):
        if which == "unet":
            return likeness.by_keypoints(1.0, mask=mask, side=side)(picture)
        return likeness.by_eyes(1.0, mask=mask)(picture)

    ways = {"words": None, "Regions": by_regions(models), "and faces": by_regions(models, place)}
    found = {name: drawn(reader, models, case, steer, **options)[0] for name, steer in ways.items()}
    return found | {"reachable": truth(reader, models[2], case)}


MERGES = {"off": None, "words alone": 1.0, "merge 0.3": 0.3, "merge 0": 0.0}  # off: without the node


def curve(count, **options):
    """`judge` for each of MERGES, and what can be reached."""
    reader, models, case = load_reader(), load.load_model("unet"), cases(count)
    found = {name: drawn(reader, models, case, merge if merge is None else by_words(models, merge), **options)[0]
             for name, merge in MERGES.items()}
    found["reachable"] = truth(reader, models[2], case)
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in found.items()}
