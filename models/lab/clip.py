"""Stage "clip": one space for what the text encoder reads and what the image encoder sees, as of a CLIP.

    clip.safetensors   the projection of the pooled text; the image encoder keeps its own

Both encoders stay as they are. Captions name a part of a portrait, so that several portraits fit one caption, and all
of them count as right (Radford et al. 2021, 2103.00020, with more than one positive).
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from . import common, data, load, vision
from .captions import phrases
from .edit import text_encoder
from .portrait import FACTORS, Portrait, draw
from .text import Vocabulary

PORTRAITS, STEPS, BATCH = 4000, 1500, 256


@torch.no_grad()
def seen(portraits):
    """Embeddings of portraits, [n, E], of length 1."""
    eye, found = vision.exported(), []
    for at in range(0, len(portraits), 100):
        images = torch.from_numpy(np.stack([draw(p) for p in portraits[at : at + 100]])).to(common.device())
        found.append(vision.look(eye, images.float() / 255)[1])
    return F.normalize(torch.cat(found).float(), dim=-1)


@torch.no_grad()
def read(captions):
    """The pooled text of captions, lists of phrases, before the projection: [n, D]."""
    encoder, vocabulary, found = text_encoder(), Vocabulary(), []
    for at in range(0, len(captions), 100):
        rows = torch.tensor([vocabulary.encode(parts) for parts in captions[at : at + 100]], device=common.device())
        end = (rows == vocabulary.rows[vocabulary.end]).int().argmax(1)
        found.append(encoder(rows)[torch.arange(len(rows), device=rows.device), end])
    return torch.cat(found).float()


def loss(u, v, fits, scale):
    """Cross-entropy of u [n, E] with v [n, E] and back, where all of `fits` [n, n] are right."""
    logits = scale * F.normalize(u, dim=-1) @ v.T
    right = [-(torch.log_softmax(s, 1) * f).sum(1) / f.sum(1) for s, f in ((logits, fits), (logits.T, fits.T))]
    return sum(part.mean() for part in right) / 2


def train(out, seed=0, portraits=PORTRAITS, steps=STEPS):
    rng, names, generator = random.Random(seed), list(FACTORS), torch.Generator().manual_seed(seed)
    people = [Portrait.from_seed(rng.randrange(data.HELD_OUT)) for _ in range(portraits)]
    said = [set(rng.sample(names, rng.randint(1, len(names)))) for _ in people]
    v, t = seen(people), read([phrases(p, s) for p, s in zip(people, said, strict=True)])
    indices = torch.tensor([p.indices for p in people], device=v.device)
    told = torch.tensor([[name in s for name in names] for s in said], device=v.device)
    weight = torch.nn.Parameter(torch.eye(t.shape[1], device=v.device))
    scale = torch.nn.Parameter(torch.tensor(3.0, device=v.device))  # its logarithm
    optimiser = torch.optim.Adam([weight, scale], betas=(0.9, 0.99))
    log = common.Log("clip", steps, batch=BATCH)
    for step in range(1, steps + 1):
        optimiser.param_groups[0]["lr"] = 5e-3 * common.schedule(step / steps, hold=0.5)
        at = torch.randint(len(t), (BATCH,), generator=generator).to(v.device)
        fits = ((indices[at, None] == indices[None, at]) | ~told[at, None]).all(2).float()
        error = loss(t[at] @ weight.T, v[at], fits, scale.exp())
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        if step % 100 == 0:
            log.write(step, loss=float(error.detach()))
            log.tick(step)
    save_file({"text_projection.weight": weight.detach().half().contiguous().cpu()}, out / "clip.safetensors")


@torch.no_grad()
def zero_shot(count=500):
    """{factor: share of unseen portraits whose value is the one whose text is nearest}."""
    from ...patches.measurement.clipguidance import pooled

    people, _ = data.held_out(count, 50_000)
    clip, vision = load.load_clip(), load.load_vision()
    images = torch.from_numpy(np.stack([draw(p) for p in people])).float() / 255
    v = F.normalize(torch.cat([vision.encode_image(part).image_embeds for part in images.split(100)]).float(), dim=-1)
    found = {}
    for n, (name, values) in enumerate(FACTORS.items()):
        texts = [", ".join(phrases(Portrait(**{name: value}), {name})) for value in values]
        u = torch.cat([pooled(clip, text) for text in texts]).float()
        right = (v @ F.normalize(u, dim=-1).T).argmax(1) == torch.tensor([p.indices[n] for p in people])
        found[name] = round(float(right.float().mean()), 4)
    return found
