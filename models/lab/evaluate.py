"""Stage "eval": measure the shipped weights and write the figures into the card.

Every figure here comes from held-out portraits or fresh noise; nothing is written by hand.
"""

import functools
import json
import time

import comfy.sample
import node_helpers
import numpy as np
import torch

from . import data, timing, vae
from .captions import caption
from .card import card, last_rows
from .load import TIMES, load_model, load_vae
from .portrait import FACTORS, SIZE, draw
from .reader import load_reader
from .reading import pair, reconstruct

STEPS, CFG = 20, 5.0
EDIT = dict(count=128, cfg=3.0)  # pictures that are edited, and how
FLOW = dict(cfg=4.0, scheduler="simple")  # how the DiT is sampled


def tensor(pictures):
    """uint8 [B, H, W, 3] -> the reader's float [B, 3, H, W] in [0, 1]."""
    return (data.to_tensor(pictures, "cpu") + 1) / 2


def conditioning(clip, prompts, pooled=None):
    """One CONDITIONING whose batch holds one prompt per picture; `pooled`: other prompts for the pooled vectors."""
    encoded = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in prompts]
    context, y = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return [[context, {"pooled_output": y if pooled is None else conditioning(clip, pooled)[0][1]["pooled_output"]}]]


def sample(models, prompts, seed, **options):
    """`sample_noise` from the noise of a seed."""
    return sample_noise(models, prompts, noise_of(len(prompts), seed), **options)


def noise_of(count, seed):
    return torch.randn(count, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_noise(
    models,
    prompts,
    noise,
    latent=None,
    steps=STEPS,
    cfg=CFG,
    sampler="euler",
    scheduler="normal",
    pooled=None,
    image=None,
    steer=None,
):
    """Pictures [B, 3, 128, 128] in [0, 1], one per prompt, as KSampler makes them from `latent` or an empty one.

    `image`: latents [B, 4, 16, 16] that both conditionings carry, for the model that edits.
    `steer`: (MODEL, positive, negative) -> the same, steered.
    """
    model, clip, decoder = models
    latent = torch.zeros_like(noise) if latent is None else latent
    conds = conditioning(clip, prompts, pooled), conditioning(clip, [""])
    if image is not None:
        conds = [node_helpers.conditioning_set_values(c, {"concat_latent_image": image}) for c in conds]
    if steer is not None:
        model, *conds = steer(model, *conds)
    run = dict(steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler, seed=0, disable_pbar=True)
    out = comfy.sample.sample(model, noise, positive=conds[0], negative=conds[1], latent_image=latent, **run)
    return decoder.decode(out).movedim(-1, 1).float()


def hits(reader, pictures, portraits):
    """bool [B, factors]: the reader sees what the portrait says."""
    with torch.no_grad():
        logits = reader(pictures)[0]
    targets = torch.tensor([p.indices for p in portraits])
    return torch.stack([x.argmax(1) == targets[:, i] for i, x in enumerate(logits)], 1)


def table(rates):
    return {name: round(float(rate), 4) for name, rate in zip(FACTORS, rates, strict=True)}


def prompt_hits(reader, models, prompts=64, seeds=4, first=0, **options):
    """Share of full prompts whose factor shows, per factor, over `seeds` noises; and the contact sheet's pictures.

    `options` go to `sample_noise`."""
    portraits = data.held_out(prompts, 1000)[0]
    texts = [caption(p) for p in portraits]
    made = [sample(models, texts, first + seed, **options) for seed in range(seeds)]
    return table(torch.cat([hits(reader, x, portraits) for x in made]).float().mean(0)), made[0]


def leak(reader, models, count=48, **options):
    """Hide an unrelated picture's latent under the full starting noise, and see which of prompt and picture shows."""
    prompted, hidden = data.held_out(count, 2000)[0], data.held_out(count, 3000)
    latent = models[2].encode(torch.from_numpy(hidden[1]).float() / 255)
    made = sample(models, [caption(p) for p in prompted], 7, latent=latent, **options)
    return shown(reader, made, prompted, hidden[0])


def heeds(reader, models, count=48, **options):
    """Give the context of one prompt and the pooled vector of another, and see which of the two shows; then the
    pooled vector beside an empty context. {factor: (share of context, share of pooled, share of pooled alone)}."""
    context, pooled = data.held_out(count, 2000)[0], data.held_out(count, 3000)[0]
    texts = [[caption(p) for p in portraits] for portraits in (context, pooled)]
    made = sample(models, texts[0], 7, pooled=texts[1], **options)
    alone = sample(models, [""] * count, 7, pooled=texts[1], **options)
    right = table(hits(reader, alone, pooled).float().mean(0))
    return {name: (*pair, right[name]) for name, pair in shown(reader, made, context, pooled).items()}


def shown(reader, pictures, these, those):
    """Where two portraits differ in a factor, which does the picture show? {factor: (share of these, of those)}."""
    as_these, as_those = hits(reader, pictures, these), hits(reader, pictures, those)
    differ = torch.tensor([p.indices for p in these]) != torch.tensor([p.indices for p in those])
    count = differ.sum(0).clamp(min=1)
    one, other = table((as_these & differ).sum(0) / count), table((as_those & differ).sum(0) / count)
    return {name: (one[name], other[name]) for name in FACTORS}


@functools.cache
def held_out_edits(count):
    """Edits of portraits that no stage trains on: (sources' latents, instructions that name the changed factor alone,
    the edited portraits, bool [count, factors] that marks the changed one, the edited pictures through the VAE)."""
    made, autoencoder = [data.edit(data.HELD_OUT + 7000 + i) for i in range(count)], load_vae()
    drawn = [torch.from_numpy(np.stack([draw(x[i]) for x in made])).float() / 255 for i in (0, 1)]
    with torch.inference_mode():
        images, truth = (autoencoder.encode(x) for x in drawn)
        truth = autoencoder.decode(truth).movedim(-1, 1).float()
    changed = torch.tensor([[name == factor for factor in FACTORS] for *_, name in made])
    return images, [caption(edited, (name,)) for _, edited, name in made], [x[1] for x in made], changed, truth


def edits(reader, models, count, seeds=1, **options):
    """Edit pictures by a text -> shares of pictures that show the changed factor and the others, PSNR to the drawn
    truth, identity (cosine) with it, per factor the share of its edits that show, and the pictures of all seeds."""
    image, texts, portraits, changed, truth = held_out_edits(count)
    made = [sample(models, texts, seed, image=image, **options).clamp(0, 1) for seed in range(seeds)]
    seen = torch.stack([hits(reader, x, portraits) for x in made]).float().mean(0)
    error = torch.stack([(x - truth).square().flatten(1).mean(1) for x in made])
    with torch.no_grad():
        face = reader(truth)[2]
        same = torch.stack([(reader(x)[2] * face).sum(1) for x in made])
    return {
        "edited": float(seen[changed].mean()),
        "kept": float(seen[~changed].mean()),
        "PSNR": float(-10 * error.log10().mean()),
        "identity": float(same.mean()),
        "factors": table((seen * changed).sum(0) / changed.sum(0)),
        "pictures": made,
    }


def auc(positive, negative):
    """Area under the ROC curve: the chance that a positive pair scores above a negative one."""
    ranks = torch.cat([positive, negative]).argsort().argsort()[: len(positive)].double() + 1
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


@torch.no_grad()
def reader_report(reader, count=1000):
    """Accuracies on held-out renders and reconstructions, geometry R2, and identity verification on unseen faces."""
    portraits, pictures = data.held_out(count)
    rebuilt = reconstruct(taesd(), pictures)
    report = {}
    for name, x in (("renders", pictures), ("reconstructions", rebuilt)):
        parts = [slice(i, i + 100) for i in range(0, count, 100)]
        correct = torch.cat([hits(reader, tensor(x[part]), portraits[part]) for part in parts])
        measured = torch.cat([reader(tensor(x[part]))[1] for part in parts])
        truth = torch.tensor([p.geometry for p in portraits])
        r2 = 1 - (measured - truth).square().mean(0) / truth.var(0)
        report[name] = dict(accuracy=table(correct.float().mean(0)), geometry_r2=[round(v, 3) for v in r2.tolist()])
    twins = [pair(data.HELD_OUT + i) for i in range(count // 2)]
    sides = [np.stack([draw(t[s]) for t in twins]) for s in (0, 1)]
    for name, (a, b) in (("renders", sides), ("reconstructions", [reconstruct(taesd(), s) for s in sides])):
        a, b = (torch.cat([reader(tensor(x[i : i + 100]))[2] for i in range(0, len(x), 100)]) for x in (a, b))
        report[name]["identity_auc"] = round(auc((a * b).sum(1), (a * b.roll(1, 0)).sum(1)), 4)
    return report


def taesd():
    model = vae.network().float()
    model.load_state_dict(load_vae().first_stage_model.state_dict())
    return model.eval()


def seconds_per_picture(models, **options):
    text = [caption(data.held_out(1, 4000)[0][0])]
    sample(models, text, 0, steps=2, **options)
    began = time.time()
    sample(models, text, 1, **options)
    return round(time.time() - began, 2)


def sheet(pictures, path, columns=8):
    """Write pictures [B, 3, H, W] as one contact sheet."""
    from PIL import Image

    x = (pictures.movedim(1, -1).clamp(0, 1) * 255).round().byte().numpy()
    x = x[: len(x) // columns * columns].reshape(-1, columns, SIZE, SIZE, 3).swapaxes(1, 2)
    Image.fromarray(x.reshape(-1, columns * SIZE, 3)).save(path, quality=90)


PROMPTS, SEEDS = 64, 4


def _vae(out):
    mean, low = vae.psnr(taesd(), data.held_out(256, 5000)[1])
    return {"psnr": round(mean, 2), "psnr_min": round(low, 2)}


def _unet(out):
    rates, pictures = prompt_hits(load_reader(), load_model("unet"), PROMPTS, SEEDS)
    sheet(pictures[:40], out / "sheet.jpg")
    return rates


def _edit(out):
    found = edits(load_reader(), load_model("unet-edit"), **EDIT)
    made = found.pop("pictures")[0]
    sources = tensor(np.stack([draw(data.edit(data.HELD_OUT + 7000 + i)[0]) for i in range(16)]))
    sheet(torch.cat([sources[:8], made[:8], sources[8:], made[8:16]]), out / "sheet_edit.jpg")
    return {name: value if name == "factors" else round(value, 4) for name, value in found.items()}


def _dit(out):
    rates, pictures = prompt_hits(load_reader(), load_model("dit"), PROMPTS, SEEDS, **FLOW)
    sheet(pictures[:40], out / "sheet_dit.jpg")
    return rates


MEASURES = {
    "vae": _vae,
    "reader": lambda out: reader_report(load_reader()),
    "unet": _unet,
    "unet-weak": lambda out: prompt_hits(load_reader(), load_model("unet-weak"), PROMPTS, 1)[0],
    "unet-edit": _edit,
    "time": lambda out: {which: timing.score(which) for which in TIMES},
    "dit": _dit,
    "dit-weak": lambda out: prompt_hits(load_reader(), load_model("dit-weak"), PROMPTS, 1, **FLOW)[0],
    "leak": lambda out: leak(load_reader(), load_model("unet")),
    "dit-leak": lambda out: leak(load_reader(), load_model("dit"), **FLOW),
    "dit-heeds": lambda out: heeds(load_reader(), load_model("dit"), **FLOW),
    "seconds": lambda out: seconds_per_picture(load_model("unet")),
    "dit-seconds": lambda out: seconds_per_picture(load_model("dit"), **FLOW),
    "megabytes": lambda out: round(sum(p.stat().st_size for p in out.glob("*.safetensors")) / 2**20, 1),
}


def write_card(out, only=()):
    """Measure (all, or the parts named in `only`) -> `out`/scores.json, sheet.jpg and, once complete, card.md."""
    from . import likeness

    path, measures = out / "scores.json", MEASURES | likeness.measures()
    for name in only or measures:
        value = measures[name](out)
        scores = json.loads(path.read_text()) if path.exists() else {}
        scores[name] = value
        data.write_json(path, scores)
        print(name, json.dumps(value))
    if set(scores) == set(measures):
        how = dict(prompts=PROMPTS, seeds=SEEDS, steps=STEPS, cfg=CFG, flow=FLOW, edit=EDIT)
        how |= dict(references=likeness.REFERENCES)
        (out / "card.md").write_text(card(scores, last_rows(out / "training.csv"), **how))
