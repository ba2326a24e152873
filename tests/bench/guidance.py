"""Cost of guidance: forwards, FLOPs and time per step, for plain CFG, core's PAG and SteerPAG.

    python tests/bench/guidance.py [--repeats 5] [--models lab sd15]

FLOPs are counted (torch.utils.flop_counter) and do not depend on the machine. Times are ratios to plain CFG, the
methods taking turns in one process, the median over the repeats: run it on a machine that does nothing else.
Writes tests/bench/results.md.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402

RESULTS = Path(__file__).with_name("results.md")
STEPS = 2


def lab():
    from steer.models.lab.load import load_model

    model, clip, _ = load_model("unet")
    texts = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a man with a red hat, smiling", ""))
    return model, dict(zip(("positive", "negative"), texts, strict=True)), 16


def sd15():
    import toy

    conds = dict(positive=toy.text(1, width=768), negative=toy.text(2, width=768))
    return toy.model(toy.SD15), conds, 32


MODELS = {"lab": ("Lab-UNet, 128 px", lab), "sd15": ("SD1.5 UNet, full size, random weights, 256 px", sd15)}


def methods(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from steer.patches.guidance import apg, cfgpp, pag
    from steer.patches.shared.schedule import Schedule

    always = Schedule()
    return {
        "CFG": model,
        "core PAG": PerturbedAttentionGuidance.execute(model, 3.0).result[0],
        "SteerPAG": pag.apply(model, 3.0, "auto", always),
        "SteerPAG to 40 %": pag.apply(model, 3.0, "auto", Schedule(0.0, 0.4)),
        "SteerAPG": apg.apply(model, 0.0, 15.0, -0.5, always),
        "SteerCFGPP": cfgpp.apply(model, 0.6, always),
    }


def measure(name, repeats):
    """Rows (method, forwards, TFLOPs, time ratio to CFG, time ratio to core PAG), all per step."""
    import toy
    from torch.utils.flop_counter import FlopCounterMode

    label, make = MODELS[name]
    model, conds, size = make()
    kinds = methods(model)

    def run(kind):
        # a schedule whose steps lie on both sides of 40 %
        return toy.sample(kinds[kind], steps=STEPS, start=toy.noise(height=size, width=size), **conds)

    rows = {}
    for kind in kinds:
        with toy.count_forwards(model) as count, FlopCounterMode(display=False) as flops:
            run(kind)
        rows[kind] = count.calls / STEPS, count.rows / STEPS, flops.get_total_flops() / STEPS
    times = {kind: [] for kind in kinds}
    for i in range(repeats):
        for kind in kinds:
            print(f"\r{label}: round {i + 1} of {repeats}, {kind:<20}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            run(kind)
            times[kind].append(time.perf_counter() - start)
    print(file=sys.stderr)

    def ratio(kind, to):
        return statistics.median(a / b for a, b in zip(times[kind], times[to], strict=True))

    seconds = statistics.median(times["CFG"]) / STEPS
    return label, seconds, [(k, *rows[k], ratio(k, "CFG"), ratio(k, "core PAG")) for k in kinds]


def table(label, seconds, rows):
    lines = [
        f"## {label}",
        "",
        f"Plain CFG takes {seconds:.3f} s per step here.",
        "",
        "| method | forwards per step | rows per step | GFLOPs per step | time / CFG | time / core PAG |",
        "|---|---|---|---|---|---|",
    ]
    for kind, calls, count, flops, to_cfg, to_core in rows:
        lines.append(f"| {kind} | {calls:g} | {count:g} | {flops / 1e9:.2f} | {to_cfg:.3f} | {to_core:.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which the methods take turns")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    host.enter()
    host.load_pack()
    import torch

    parts = [
        "# Cost of guidance",
        "Made by `python tests/bench/guidance.py`. Forwards, rows and FLOPs are counted; times are medians of ratios, "
        f"methods interleaved, {args.repeats} rounds of {STEPS} steps, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}, fp32.",
        *(table(*measure(name, args.repeats)) for name in args.models),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
