"""What guidance does to the pictures of the lab's trained model.

    python tests/bench/lab_guidance.py [--prompts 48] [--seeds 2]

Prompts name every factor of held-out portraits, so the truth can be drawn. Per setting:
    hits        share of factors that the reader finds as prompted
    PSNR        to the drawn truth as the VAE renders it; faces differ in their proportions, so 25 dB is out of reach
    saturation  mean HSV saturation minus the truth's: above 0 is burnt
    clipped     share of colour values at the ends of their range, minus the truth's
and, without any prompt and without CFG,
    FD          Frechet distance between samples and drawn portraits in the reader's features: lower is more real
Writes tests/bench/lab_guidance.md.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402

RESULTS = Path(__file__).with_name("lab_guidance.md")


@cache
def lab():
    """(MODEL, CLIP, VAE), reader."""
    from steer.models.lab.load import load_model
    from steer.models.lab.reader import load_reader

    return load_model("unet"), load_reader()


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


def saturation(x):
    """Mean HSV saturation per picture."""
    high, low = x.amax(1), x.amin(1)
    return ((high - low) / high.clamp(min=1e-3)).flatten(1).mean(1)


def clipped(x):
    return ((x < 0.02) | (x > 0.98)).float().flatten(1).mean(1)


def measure(steer=lambda model: model, prompts=48, seeds=2, **sampling):
    """{figure: mean} of a steered lab model; `sampling` as models/lab/evaluate.py's `sample`."""
    import torch
    from steer.models.lab.evaluate import hits, sample

    (model, clip, vae), reader = lab()
    portraits, captions, drawn = truth(prompts)
    made = [sample((steer(model), clip, vae), captions, seed, **sampling) for seed in range(seeds)]
    x, drawn = torch.cat(made).clamp(0, 1), drawn.repeat(seeds, 1, 1, 1)
    return {
        "hits": float(hits(reader, x, portraits * seeds).float().mean()),
        "PSNR": float((-10 * (x - drawn).square().flatten(1).mean(1).log10()).mean()),
        "saturation": float((saturation(x) - saturation(drawn)).mean()),
        "clipped": float((clipped(x) - clipped(drawn)).mean()),
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


def unconditional(steer=lambda model: model, count=96, seed=0, **sampling):
    """FD of samples without prompt and without CFG."""
    import torch
    from steer.models.lab.evaluate import sample

    (model, clip, vae), _ = lab()
    made = [sample((steer(model), clip, vae), [""] * 24, seed + i, cfg=1.0, **sampling) for i in range(count // 24)]
    return frechet(features(torch.cat(made).clamp(0, 1)), real())


def settings():
    from steer.patches.guidance import apg, cfgpp, pag
    from steer.patches.shared.schedule import Schedule

    always = Schedule()
    for cfg in (1.0, 2.0, 5.0, 7.5, 9.0, 14.0):
        yield f"CFG {cfg:g}", dict(cfg=cfg)
    for scale in (1.0, 3.0):
        yield f"CFG 2, PAG {scale:g}", dict(cfg=2.0, steer=lambda m, s=scale: pag.apply(m, s, "auto", always))
    for cfg in (7.5, 14.0):
        for eta, r, beta in ((0.0, 15.0, -0.5), (0.0, 0.75, -0.5), (0.0, 0.75, 0.0), (1.0, 0.75, 0.0), (0.0, 0.0, 0.0)):
            name = f"CFG {cfg:g}, APG eta {eta:g}, threshold {r:g}, momentum {beta:g}"
            yield name, dict(cfg=cfg, steer=lambda m, a=(eta, r, beta): apg.apply(m, *a, always))
    for lam in (0.2, 0.4, 0.6, 0.8, 1.0):
        yield f"CFG++ {lam:g}", dict(cfg=5.0, steer=lambda m, s=lam: cfgpp.apply(m, s, always))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    host.enter()
    host.load_pack()
    lines = [
        "# What guidance does on the lab",
        "",
        f"Made by `python tests/bench/lab_guidance.py`: {args.prompts} prompts, {args.seeds} seeds, 20 steps of euler. "
        "The lab proves the implementation, not the looks on other models.",
        "",
        "| setting | hits | PSNR | saturation | clipped |",
        "|---|---|---|---|---|",
    ]
    for name, setting in settings():
        figures = measure(prompts=args.prompts, seeds=args.seeds, **setting)
        row = f"| {name} | {figures['hits']:.3f} | {figures['PSNR']:.2f} | {figures['saturation']:+.3f} | "
        lines.append(row + f"{figures['clipped']:+.3f} |")
        print(lines[-1], flush=True)
    from steer.patches.guidance import pag
    from steer.patches.shared.schedule import Schedule

    lines += ["", f"Without prompt and without CFG, {4 * args.prompts} samples:", "", "| PAG scale | FD |", "|---|---|"]
    for scale in (0.0, 1.0, 2.0, 3.0, 4.0):
        distance = unconditional(lambda m, s=scale: pag.apply(m, s, "auto", Schedule()), 4 * args.prompts)
        lines.append(f"| {scale:g} | {distance:.2f} |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
