"""Stage "eval": measure the shipped weights and write the figures into the card.

Every figure here comes from held-out portraits or fresh noise; nothing is written by hand.
"""

import json
import time

import comfy.sample
import numpy as np
import torch

from . import data, vae
from .captions import caption
from .load import load_model, load_vae
from .portrait import FACTORS, SIZE, draw
from .reader import load_reader
from .reading import pair, reconstruct

STEPS, CFG = 20, 5.0


def tensor(pictures):
    """uint8 [B, H, W, 3] -> the reader's float [B, 3, H, W] in [0, 1]."""
    return (data.to_tensor(pictures, "cpu") + 1) / 2


def conditioning(clip, prompts):
    """One CONDITIONING whose batch holds one prompt per picture."""
    return [[torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in prompts]), {}]]


def sample(models, prompts, seed, **options):
    """`sample_noise` from the noise of a seed."""
    noise = torch.randn(len(prompts), 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    return sample_noise(models, prompts, noise, **options)


@torch.no_grad()
def sample_noise(models, prompts, noise, latent=None, steps=STEPS, cfg=CFG, sampler="euler", scheduler="normal"):
    """Pictures [B, 3, 128, 128] in [0, 1], one per prompt, as KSampler makes them from `latent` or an empty one."""
    model, clip, decoder = models
    latent = torch.zeros_like(noise) if latent is None else latent
    conds = conditioning(clip, prompts), conditioning(clip, [""])
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


def prompt_hits(reader, models, prompts=64, seeds=4, first=0):
    """Share of full prompts whose factor shows, per factor, over `seeds` noises; and the contact sheet's pictures."""
    portraits = data.held_out(prompts, 1000)[0]
    texts = [caption(p) for p in portraits]
    made = [sample(models, texts, first + seed) for seed in range(seeds)]
    return table(torch.cat([hits(reader, x, portraits) for x in made]).float().mean(0)), made[0]


def leak(reader, models, count=48):
    """Hide an unrelated picture's latent under the full starting noise. Where it and the prompt differ in a factor,
    which of the two does the sample show? {factor: (share as prompted, share as hidden)}."""
    prompted, hidden = data.held_out(count, 2000)[0], data.held_out(count, 3000)
    latent = models[2].encode(torch.from_numpy(hidden[1]).float() / 255)
    made = sample(models, [caption(p) for p in prompted], 7, latent=latent)
    as_said, as_hidden = hits(reader, made, prompted), hits(reader, made, hidden[0])
    differ = torch.tensor([p.indices for p in prompted]) != torch.tensor([p.indices for p in hidden[0]])
    count = differ.sum(0).clamp(min=1)
    said, shown = table((as_said & differ).sum(0) / count), table((as_hidden & differ).sum(0) / count)
    return {name: (said[name], shown[name]) for name in FACTORS}


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


def seconds_per_picture(models):
    text = [caption(data.held_out(1, 4000)[0][0])]
    sample(models, text, 0, steps=2)
    began = time.time()
    sample(models, text, 1)
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


MEASURES = {
    "vae": _vae,
    "reader": lambda out: reader_report(load_reader()),
    "unet": _unet,
    "unet-weak": lambda out: prompt_hits(load_reader(), load_model("unet-weak"), PROMPTS, 1)[0],
    "leak": lambda out: leak(load_reader(), load_model("unet")),
    "seconds": lambda out: seconds_per_picture(load_model("unet")),
    "megabytes": lambda out: round(sum(p.stat().st_size for p in out.glob("*.safetensors")) / 2**20, 1),
}


def write_card(out, only=()):
    """Measure (all, or the parts named in `only`) -> `out`/scores.json, sheet.jpg and, once complete, card.md."""
    path = out / "scores.json"
    for name in only or MEASURES:
        value = MEASURES[name](out)
        scores = json.loads(path.read_text()) if path.exists() else {}
        scores[name] = value
        data.write_json(path, scores)
        print(name, json.dumps(value))
    if set(scores) == set(MEASURES):
        (out / "card.md").write_text(card(scores, last_rows(out / "training.csv")))


def last_rows(path):
    """The last logged value of every (stage, name), with its step, samples and seconds."""
    with path.open() as f:
        rows = [line.strip().split(",") for line in f][1:]
    return {(stage, name): (int(a), int(b), int(c), value) for stage, a, b, c, name, value in rows}


def card(scores, log):
    """The model card in Markdown."""
    mean = {which: sum(scores[which].values()) / len(FACTORS) for which in ("unet", "unet-weak")}
    seen = {name: scores["reader"][name] for name in ("renders", "reconstructions")}
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {1 / len(values):.2f} | {seen['renders']['accuracy'][name]:.3f} "
        f"| {seen['reconstructions']['accuracy'][name]:.3f} | {scores['unet'][name]:.3f} "
        f"| {scores['unet-weak'][name]:.3f} | {scores['leak'][name][0]:.2f} / {scores['leak'][name][1]:.2f} |"
        for name, values in FACTORS.items()
    )
    stages = "\n".join(
        f"| {stage} | {step} | {samples} | {seconds / 60:.1f} | {name} {value} |"
        for (stage, name), (step, samples, seconds, value) in log.items()
        if name in ("loss", "psnr", "eps_error", "accuracy")
    )
    r2 = {name: ", ".join(f"{v:.2f}" for v in x["geometry_r2"]) for name, x in seen.items()}
    auc = {name: x["identity_auc"] for name, x in seen.items()}
    fixed = dict(prompts=PROMPTS, seeds=SEEDS, steps=STEPS, cfg=CFG)
    return CARD.format(rows=rows, stages=stages, auc=auc, r2=r2, mean=mean, **fixed, **scores)


CARD = """# The lab models

Tiny models that ship with Steer, trained from nothing on portraits drawn by `models/lab/portrait.py`. They make every
method runnable in seconds and its effect measurable. They prove an implementation, not the picture quality that the
same method reaches on a large model. {megabytes} MB together, fp16, Apache-2.0, no third-party data.

This file, `scores.json` and `sheet.jpg` are written by `python models/lab/train.py eval`.

![samples](sheet.jpg)

## Parts

| file | network | serves as |
|---|---|---|
| vae.safetensors | TAESD, 8x, 4 channels | VAE |
| text.safetensors | CLIP text transformer, 2 layers, 128 wide; one token row for all words unknown to captions | CLIP |
| unet.safetensors | UNetModel, 64 channels, 16x16 and 8x8, attention everywhere, eps-prediction | MODEL |
| unet_weak.safetensors | the same network early in its training | MODEL |
| reader.safetensors | convolutions; factors, face geometry, 512-d identity | Lab Read |

## Recipe

`python models/lab/train.py all`, resumable, on one core of a CPU with bf16 instructions. Muon for matrices and
convolutions, Adam for the rest, weight averages shipped. VAE: 64x64 crops, L1 + 10 L2 + 0.25 edges, latent noise.
Text: first taught to name the factors of a caption, then trained with the UNet for the first eighth, then frozen.
UNet: latents whitened to a standard deviation of 0.4 so that the layout does not show through the starting noise,
noise levels stratified, the eps error divided by its running mean per noise level, 10 % empty prompts, captions with
random omissions, order and unknown words; the transformers at 16x16 join late, so that the level at 8x8 and the middle
are used. Reader: pairs of pictures of one face; renders, degraded renders, and reconstructions from noisy latents.

| stage | steps | samples | minutes | last logged |
|---|---|---|---|---|
{stages}

## Figures

VAE on 256 held-out renders: PSNR {vae[psnr]} dB on average, {vae[psnr_min]} dB at worst.
A {steps}-step picture at CFG {cfg} took {seconds} s with one CPU thread, text encoding and decoding included.

Prompt hits: share of {prompts} full held-out prompts x {seeds} noises whose factor the reader finds in the sample
(euler, normal, {steps} steps, CFG {cfg}). Mean {mean[unet]:.3f}; the weaker sibling {mean[unet-weak]:.3f} (one noise).
Leak: an unrelated picture hides under the full starting noise; where it and the prompt differ, the share of samples
that show the factor as prompted / as hidden.

| factor | chance | reader: renders | reader: through VAE | prompt hits | weaker | leak: prompted / hidden |
|---|---|---|---|---|---|---|
{rows}

Identity verification on unseen faces (same face geometry, everything else drawn anew): AUC {auc[renders]} on renders,
{auc[reconstructions]} through the VAE. R2 of the geometry (face aspect, eye spacing, eye size, nose length, mouth
width, brow angle): {r2[renders]} on renders; {r2[reconstructions]} through the VAE.
"""
