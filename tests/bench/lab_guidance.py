"""What guidance does to the pictures of the lab's trained models.

    python tests/bench/lab_guidance.py [--prompts 32] [--seeds 4] [--steps 20] [--tables 1 2 ...]

Prompts name every factor of held-out portraits, so the truth can be drawn. Per setting, over prompts and seeds:
    rows        rows of the network per step: 2 is plain CFG
    hits        share of factors that the reader finds as prompted
    fit         mean log-probability that the reader gives to what was prompted, 0 at best: also tells near misses
    PSNR        to the drawn truth as the VAE renders it; faces differ in their proportions, so 25 dB is out of reach
    saturation  distance of a picture's mean HSV saturation to its truth's
    contrast    distance of a picture's standard deviation of brightness to its truth's
    diversity   distance between pictures of one prompt and different seeds, in the reader's features
and, without any prompt and without CFG,
    FD          Frechet distance between samples and drawn portraits in the reader's features: lower is more real
and for edits of held-out portraits by a text that names nothing but one changed factor,
    edited      share of pictures that show the changed factor
    kept        share of all other factors that are as in the source
    PSNR        to the drawn truth, the source with the change, as the VAE renders it
    identity    of the face with that truth's, a cosine
Writes the chosen tables into tests/bench/lab_guidance.md, and with the first one nodes/help/guidance.jpg.
"""

import sys
from functools import cache
from itertools import combinations
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_name("lab_guidance.md")
PICTURE = host.ROOT / "nodes" / "help" / "guidance.jpg"


@cache
def lab(which="unet"):
    """(MODEL, CLIP, VAE), reader."""
    from steer.models.lab.load import load_model
    from steer.models.lab.reader import load_reader

    return load_model(which), load_reader()


@cache
def truth(prompts):
    """(portraits, captions, their pictures through the VAE [B, 3, 128, 128])."""
    import torch
    from steer.models.lab import data
    from steer.models.lab.captions import caption

    portraits, pictures = data.held_out(prompts, 5000)
    vae = lab()[0][2]
    with torch.inference_mode():
        drawn = vae.decode(vae.encode(torch.from_numpy(pictures).float() / 255)).movedim(-1, 1).float()
    return portraits, [caption(p) for p in portraits], drawn


def sampled(which):
    """How a lab model is sampled, unless said otherwise."""
    return {"steps": 20, **({"scheduler": "simple"} if which.startswith("dit") else {})}


def saturation(x):
    """Mean HSV saturation per picture."""
    high, low = x.amax(1), x.amin(1)
    return ((high - low) / high.clamp(min=1e-3)).flatten(1).mean(1)


def contrast(x):
    """Standard deviation of brightness per picture."""
    return x.mean(1).flatten(1).std(1)


def measure(steer=lambda model: model, prompts=32, seeds=4, which="unet", **sampling):
    """{figure: mean} of a steered lab model; `sampling` as models/lab/evaluate.py's `sample`."""
    import torch
    import toy
    from steer.models.lab.evaluate import hits, sample

    (model, clip, vae), reader = lab(which)
    portraits, captions, drawn = truth(prompts)
    sampling = {**sampled(which), **sampling}
    with toy.count_forwards(model) as count:
        made = [sample((steer(model), clip, vae), captions, seed, **sampling).clamp(0, 1) for seed in range(seeds)]
    x, drawn = torch.cat(made), drawn.repeat(seeds, 1, 1, 1)
    apart = [(features(a) - features(b)).norm(dim=1).mean() for a, b in combinations(made, 2)]
    return {
        "pictures": made[0][:4],
        "rows": count.rows / (prompts * seeds * sampling["steps"]),
        "hits": float(hits(reader, x, portraits * seeds).float().mean()),
        "fit": sum(float(reader.score(x[i : i + 1], c)) for i, c in enumerate(captions * seeds)) / len(x),
        "PSNR": float((-10 * (x - drawn).square().flatten(1).mean(1).log10()).mean()),
        "saturation": float((saturation(x) - saturation(drawn)).abs().mean()),
        "contrast": float((contrast(x) - contrast(drawn)).abs().mean()),
        "diversity": float(sum(apart) / max(len(apart), 1)),
    }


@cache
def real(count=256):
    """Features [count, 384] of drawn portraits through the VAE."""
    return features(truth(count)[2])


def features(x):
    """The reader's last hidden layer."""
    import torch

    reader = lab()[1]
    with torch.no_grad():
        return reader.hidden(reader.trunk(x * 2 - 1)).double()


def frechet(a, b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of two sets of features [n, d]."""
    import torch

    A, B = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def unconditional(steer=lambda model: model, count=96, which="unet", **sampling):
    """FD of samples without prompt and without CFG."""
    import torch
    from steer.models.lab.evaluate import sample

    (model, clip, vae), _ = lab(which)
    sampling = {**sampled(which), **sampling}
    made = [sample((steer(model), clip, vae), [""] * 24, i, cfg=1.0, **sampling) for i in range(count // 24)]
    return frechet(features(torch.cat(made).clamp(0, 1)), real())


def without(word, steer=lambda model: model, prompts=32, seeds=4, **sampling):
    """Share of pictures of bare prompts that show `word`, one of the values of the factor hat or glasses."""
    from steer.models.lab.evaluate import sample

    (model, clip, vae), reader = lab()
    texts = ["a comic portrait", "a flat portrait of a happy person"] * (prompts // 2)
    seen = []
    for seed in range(seeds):
        x = sample((steer(model), clip, vae), texts, seed, **sampling).clamp(0, 1)
        seen += [word in {value for value, _ in read.values()} for read in reader.read(x)]
    return sum(seen) / len(seen)


def edit(steer=lambda model: model, prompts=32, seeds=4, **sampling):
    """{figure: mean} of the lab's model that edits, steered; as models/lab/evaluate.py's `edits`."""
    from steer.models.lab.evaluate import edits

    (model, clip, vae), reader = lab("unet-edit")
    return edits(reader, (steer(model), clip, vae), prompts, seeds, **sampling)


def text(words):
    """A CONDITIONING of the lab's text encoder."""
    clip = lab()[0][1]
    return clip.encode_from_tokens_scheduled(clip.tokenize(words))


def grid(settings, across=6):
    """One tile of four pictures per setting, [(name, figures)], with its figures under it."""
    from PIL import Image, ImageDraw

    side, text = 2 * settings[0][1]["pictures"].shape[-1] + 2, 30
    rows = -(-len(settings) // across)
    sheet = Image.new("RGB", (across * (side + 8) - 8, rows * (side + text + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (name, figures) in enumerate(settings):
        x, y = n % across * (side + 8), n // across * (side + text + 6)
        for i, picture in enumerate(figures["pictures"]):
            tile = Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy())
            sheet.paste(tile, (x + i % 2 * (tile.width + 2), y + i // 2 * (tile.height + 2)))
        draw.text((x, y + side + 3), name, fill="black")
        draw.text((x, y + side + 15), f"hits {figures['hits']:.3f}, PSNR {figures['PSNR']:.1f}", fill="black")
    return sheet


INTRO = (
    "# What guidance does on the lab\n\nEach table says by which command it was made, with euler; what the columns "
    "mean is said at the top of `tests/bench/lab_guidance.py`. The lab proves the implementation, not the looks on "
    "other models."
)


def main():
    size, numbers = arguments(__doc__, prompts=32, seeds=4, steps=20)
    host.enter()
    host.load_pack()
    from bench.lab_settings import TABLES

    def rows(settings):
        return lambda **size: ((name, run(**size)) for name, run in settings())

    tables = [(title, columns, rows(settings)) for title, columns, settings in TABLES]
    found = make(RESULTS, INTRO, tables, size, numbers)
    if 1 in found:
        grid(found[1]).save(PICTURE, quality=85)


if __name__ == "__main__":
    main()
