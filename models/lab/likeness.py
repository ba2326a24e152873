"""What adapters and the image encoder of the lab are measured by, in the card, the benches and the tests.

A reference is a portrait that no stage trains on. The prompt names a few factors, and of each another value than the
reference's; all else, the face geometry too, is left to the reference.
"""

import functools
import random
from dataclasses import replace

import numpy as np
import torch

from . import data, evaluate, load
from .captions import caption
from .portrait import FACTORS, GEOMETRY, draw
from .reader import load_reader
from .reading import pair

NAMED = ("expression", "hat", "shirt", "background")


@functools.cache
def cases(count, first=8000, named=NAMED):
    """(references, portraits as the prompts want them, prompts, pictures of the references [n, 128, 128, 3])."""
    references, pictures = data.held_out(count, first)
    rng, wanted = random.Random(first), []
    for p in references:
        others = {name: [v for v in FACTORS[name] if v != getattr(p, name)] for name in named}
        wanted.append(replace(p, **{name: rng.choice(values) for name, values in others.items()}))
    return references, wanted, [caption(p, named) for p in wanted], torch.from_numpy(pictures).float() / 255


@functools.cache
def faces(count, first=8000, kept=()):
    """The same where the reference shows nothing but the face: the prompts tell all the factors of another portrait,
    which are the reference's own where `kept`."""
    two = [pair(data.HELD_OUT + first + n) for n in range(count)]
    pictures = np.stack([draw(one) for one, _ in two])
    wanted = [replace(other, **{name: getattr(one, name) for name in kept}) for one, other in two]
    return [one for one, _ in two], wanted, [caption(p) for p in wanted], torch.from_numpy(pictures).float() / 255


@torch.no_grad()
def judge(reader, pictures, wanted, images, named=tuple(FACTORS)):
    """Shares of the named factors that show as wanted, and of the others, which are the reference's; and the cosine of
    the faces, each with the reference's and with those of the other references."""
    seen = evaluate.hits(reader, pictures.clamp(0, 1), wanted).float()
    told = torch.tensor([name in named for name in FACTORS])
    made, face = reader(pictures.clamp(0, 1))[2], reader(images.movedim(-1, 1))[2]
    cosines = made @ face.T
    n = len(cosines)
    found = {"obeyed": seen[:, told].mean(), "identity": cosines.diagonal().mean(),
             "strangers": (cosines.sum() - cosines.trace()) / (n * (n - 1))}
    found |= {} if all(told) else {"taken": seen[:, ~told].mean()}
    return {name: float(value) for name, value in found.items()}


def drawn(reader, models, steer, case, named=NAMED, seeds=1, first=0, **options):
    """`judge` of what models (MODEL, CLIP, VAE) draw from one of the cases above, on average over seeds.

    steer(MODEL, images) -> MODEL, with one reference for each item of the batch.
    """
    _, wanted, prompts, images = case
    steered = (steer(models[0], images), *models[1:])
    return _mean([judge(reader, evaluate.sample(steered, prompts, seed, **options), wanted, images, named)
                  for seed in range(first, first + seeds)])


def drawn_alone(reader, models, steer, case, named=NAMED, seeds=1, first=0, **options):
    """The same one by one, for nodes that take one person: steer(image) -> what `evaluate.sample_noise` takes."""
    _, wanted, prompts, images = case
    steers, rows = [steer(image[None]) for image in images], []
    for seed in range(first, first + seeds):
        each = zip(prompts, evaluate.noise_of(len(prompts), seed).split(1), steers, strict=True)
        made = [evaluate.sample_noise(models, [text], noise, steer=by, **options) for text, noise, by in each]
        rows.append(judge(reader, torch.cat(made), wanted, images, named))
    return _mean(rows)


def _mean(rows):
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def truth(reader, vae, case, named=NAMED):
    """`judge` of the wanted portraits, drawn and sent through the VAE: what can be reached."""
    _, wanted, _, images = case
    x = torch.from_numpy(np.stack([draw(p) for p in wanted])).float() / 255
    with torch.inference_mode():
        x = vae.decode(vae.encode(x)).movedim(-1, 1).float()
    return judge(reader, x, wanted, images, named)


@torch.no_grad()
def probe(vision, fitted=600, tested=200, ridge=0.1):
    """What a linear map reads off the encoder's embedding, and off its hidden states: the share of factors, and R2 of
    the geometry, {"embedding": (share, R2), "hidden states": ...}; of portraits that neither has seen.

    ridge: penalty of the fit, as a share of the mean square of the inputs.
    """
    portraits, pictures = data.held_out(fitted + tested, 20_000)
    images = torch.from_numpy(pictures).float() / 255
    out = [vision.encode_image(part) for part in images.split(100)]
    factors = torch.tensor([p.indices for p in portraits])
    hot = [torch.nn.functional.one_hot(factors[:, n]) for n in range(len(FACTORS))]
    target = torch.cat([torch.tensor([p.geometry for p in portraits]), *hot], 1).double()
    target -= target[:fitted].mean(0)
    found = {}
    for name, kind in (("embedding", "image_embeds"), ("hidden states", "penultimate_hidden_states")):
        x = torch.cat([o[kind] for o in out]).flatten(1).double()
        x = (x - x[:fitted].mean(0)) / x[:fitted].std()
        gram = x @ x[:fitted].T
        penalty = ridge * gram[:fitted].trace() / fitted * torch.eye(fitted, dtype=x.dtype)
        told = gram[fitted:] @ torch.linalg.solve(gram[:fitted] + penalty, target[:fitted])
        measured, *logits = told.split([len(GEOMETRY), *(h.shape[1] for h in hot)], 1)
        right = torch.stack([v.argmax(1) == factors[fitted:, n] for n, v in enumerate(logits)]).double().mean()
        truth = target[fitted:, : len(GEOMETRY)]
        r2 = 1 - (measured - truth).square().mean(0) / truth.var(0)
        found[name] = round(float(right), 4), round(float(r2.mean()), 4)
    return found


def by_picture(strength, file="adapter.safetensors"):
    """steer of `drawn`: the lab's IP-Adapter, which looks at the references."""
    from ...patches.identity import ipadapter
    from ...patches.shared.schedule import Schedule
    from ..identity import adapter

    made, vision = adapter.load(str(load.WEIGHTS / file)), load.load_vision()
    chosen = (strength, "linear", "auto", "one each", "as trained", Schedule())
    return lambda model, images: ipadapter.apply(model, made, *chosen, images, vision)


def by_face(strength, file="adapter_faceid.safetensors"):
    """The same with the lab's FaceID adapter, which is told the reader's identity of them."""
    from ...patches.identity import faceid
    from ...patches.shared.schedule import Schedule
    from ..identity import adapter

    made, reader = adapter.load(str(load.WEIGHTS / file)), load_reader()
    chosen = (strength, "linear", "auto", "one each", "as trained", 1.0, 1.0, Schedule())
    return lambda model, images: faceid.apply(model, made, reader(images.movedim(-1, 1))[2], *chosen)


POSED = ("position", "expression")  # what keypoints show, beside the face


def by_keypoints(
    strength, control=None, file="adapter_instantid.safetensors", net="controlnet.safetensors", mask=None, side=None
):
    """steer of `drawn_alone`: the lab's InstantID, which is told the identity of a picture and shown its keypoints.

    control: strength of the ControlNet, where it is not the same.  mask: where the face counts.
    side: 0 or 1 for the left or the right half of a picture twice as wide, where the keypoints are; nothing is in the
        other.
    """
    from ...patches.identity import face, instantid
    from ...patches.shared.schedule import Schedule
    from ..identity import adapter
    from .face import LabRecogniser

    made, control_net = adapter.load(str(load.WEIGHTS / file)), load.load_control(load.WEIGHTS / net)
    finder, control = LabRecogniser(), strength if control is None else control

    def steer(image):
        who = face.faces_of(image, finder)[0]
        hint = face.drawn(who)
        if side is not None:
            hint = torch.cat((hint, torch.zeros_like(hint)), 2).roll(side * hint.shape[2], 2)
        given = made, control_net, who, hint, strength, control, "linear", "auto", Schedule()
        return lambda *models: instantid.apply(*models, *given, mask=mask)

    return steer


def by_eyes(strength, file="adapter_pulid.safetensors", mask=None):
    """The same with the lab's PuLID: the identity of a picture, and what the image encoder sees of its face."""
    from ...patches.identity import face, pulid
    from ...patches.shared.schedule import Schedule
    from ..identity import adapter
    from .face import LabRecogniser
    from .pulid import Eyes

    made, eyes, finder = adapter.load(str(load.WEIGHTS / file)), Eyes(), LabRecogniser()
    chosen = strength, "fidelity", -1, "one person", "as trained", Schedule()

    def steer(image):
        who = face.faces_of(image, finder)[0]
        return lambda model, *conds: (pulid.apply(model, made, who, eyes, *chosen, mask=mask), *conds)

    return steer


REFERENCES = 16  # unseen portraits that the adapters are shown, one noise
AMOUNTS = {"off": 0.0, "half": 0.5, "full": 1.0}  # strengths


def curve(by, case, named, which="unet", draw=drawn, **options):
    """What is drawn without an adapter, with it, and what can be reached."""
    reader, models = load_reader(), load.load_model(which)
    found = {name: draw(reader, models, by(strength), case, named, **options) for name, strength in AMOUNTS.items()}
    found["reachable"] = truth(reader, models[2], case, named)
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in found.items()}


def measures():
    """{part of the card: its figures, measured}, of the adapters that there are; called with the folder of weights."""
    from . import clip, persons

    n, every = REFERENCES, tuple(FACTORS)

    def by_picture_dit(strength):
        return by_picture(strength, "adapter_dit.safetensors")

    found = {
        "vision": ("vision", lambda out: probe(load.load_vision())),
        "clip": ("clip", lambda out: clip.zero_shot()),
        "adapter": ("adapter", lambda out: curve(by_picture, cases(n), NAMED)),
        "faceid": ("adapter_faceid", lambda out: curve(by_face, faces(n), every)),
        "instantid": ("adapter_instantid",
                      lambda out: curve(by_keypoints, faces(n, kept=POSED), every, draw=drawn_alone)),
        "adapter-dit": ("adapter_dit", lambda out: curve(by_picture_dit, cases(n), NAMED, "dit", **evaluate.FLOW)),
        "fastcomposer": ("adapter_fastcomposer", lambda out: persons.curve(n)),
        "pulid": ("adapter_pulid",
                  lambda out: curve(by_eyes, faces(n), every, "dit", drawn_alone, **evaluate.FLOW)),
    }
    return {name: go for name, (file, go) in found.items() if (load.WEIGHTS / f"{file}.safetensors").is_file()}
