"""Cost of losses of the estimate: forwards, FLOPs, memory and time of a step, by the slope at it or by the network.

    python tests/bench/measurement.py [--repeats 3] [--models lab sd15]

A scorer of latents costs nothing by itself, so that its rows show the two gradients alone; Image Guide (L2) decodes
with a TAESD. FLOPs are counted (torch.utils.flop_counter). Memory is the peak of what a run allocates beside the
weights (torch.profiler). Times are medians of ratios to plain CFG, the ways taking turns in one process; the SD1.5
weights are random, which costs the same. Writes tests/bench/measurement.md.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.guidance import lab, peak, sd15  # noqa: E402

RESULTS = Path(__file__).with_name("measurement.md")
MODELS = {"lab": ("Lab-UNet, 128 px", lab), "sd15": ("SD1.5 UNet, full size, random weights, 256 px", sd15)}
STEPS = 2


def ways(model, size):
    """{way: ModelPatcher}."""
    import torch
    from steer.models.lab.load import load_vae
    from steer.patches.measurement import imageguide, reward
    from steer.patches.shared.energy import push
    from steer.patches.shared.schedule import Schedule

    vae, image = load_vae(), torch.rand(1, 8 * size, 8 * size, 3, generator=torch.Generator().manual_seed(0))

    def score(latents):
        return -latents.square().mean((1, 2, 3))

    found = {"CFG": model}
    for form in ("estimate", "network"):
        found[f"scorer of latents, {form}"] = reward.apply(model, score, push(0.1, form), Schedule())
        found[f"Image Guide, {form}"] = imageguide.apply(model, vae, image, "L2", push(0.1, form), Schedule())
    return found


def measure(make, repeats):
    """(seconds of a CFG step, {way: (forwards, FLOPs, bytes, time ratio)}), per step but for bytes."""
    import toy
    from torch.utils.flop_counter import FlopCounterMode

    model, conds, size = make()
    models = ways(model, size)

    def run(way):
        return toy.sample(models[way], steps=STEPS, start=toy.noise(height=size, width=size), **conds)

    rows, times = {}, {way: [] for way in models}
    for way in models:
        with toy.count_forwards(model) as count, FlopCounterMode(display=False) as flops:
            run(way)
        rows[way] = count.calls / STEPS, flops.get_total_flops() / STEPS, peak(lambda w=way: run(w))
    for _ in range(repeats):
        for way in models:
            start = time.perf_counter()
            run(way)
            times[way].append(time.perf_counter() - start)
    ratio = {w: statistics.median(a / b for a, b in zip(times[w], times["CFG"], strict=True)) for w in models}
    return statistics.median(times["CFG"]) / STEPS, {way: (*rows[way], ratio[way]) for way in models}


def table(label, seconds, rows):
    lines = [f"## {label}", "", f"Plain CFG takes {seconds:.3f} s per step here.", ""]
    lines += ["| way | forwards per step | GFLOPs per step | peak MB | time / CFG |", "|---|---|---|---|---|"]
    for way, (calls, flops, most, ratio) in rows.items():
        lines.append(f"| {way} | {calls:g} | {flops / 1e9:.2f} | {most / 2**20:.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    host.enter()
    host.load_pack()
    import torch

    parts = [
        "# Cost of losses of the estimate",
        f"Made by `python tests/bench/measurement.py --repeats {args.repeats} --models {' '.join(args.models)}`, "
        f"{STEPS} steps, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, fp32.",
        *(table(MODELS[name][0], *measure(MODELS[name][1], args.repeats)) for name in args.models),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
