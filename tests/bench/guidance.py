"""Cost of guidance: forwards, rows, FLOPs, memory and time, alone and together, against core and the naive way.

The naive way is one forward of its own per extra prediction, after the guider's, as nodes do that know nothing of each
other.

    python tests/bench/guidance.py [--repeats 5] [--models lab sd15 controlnet]

FLOPs are counted (torch.utils.flop_counter) and do not depend on the machine. Memory is the peak of what a run
allocates beside the weights (torch.profiler). Times are ratios to plain CFG, the
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


def controlnet():
    """The same with a ControlNet of full size on both prompts."""
    import node_helpers
    import torch
    import toy

    model, conds, size = sd15()
    hint = torch.rand(1, 3, 8 * size, 8 * size, generator=torch.Generator().manual_seed(0))
    values = {"control": toy.controlnet(hint, config=toy.SD15), "control_apply_to_uncond": False}
    return model, {k: node_helpers.conditioning_set_values(c, values) for k, c in conds.items()}, size


MODELS = {
    "lab": ("Lab-UNet, 128 px", lab, None),
    "sd15": ("SD1.5 UNet, full size, random weights, 256 px", sd15, None),
    "controlnet": ("The same with a ControlNet of full size", controlnet,
                   ("CFG", "core PAG", "SteerPAG", "SteerPAG, rows not shared")),
}


def methods(model, conds):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance
    from steer.patches.guidance import apg, cfgpp, negative, pag, report, sag, seg, slg, tcfg
    from steer.patches.shared.schedule import Schedule

    always = Schedule()
    texts = [[[c[0] * scale, c[1]] for c in conds["negative"]] for scale in (0.9, 1.1)]

    def together(m):
        m = seg.apply(pag.apply(m, 3.0, "middle", always), 3.0, 10.0, "middle", always)
        for text in texts:
            m = negative.apply(m, text, 1.0, always)
        return m

    return {
        "CFG": model,
        "core PAG": PerturbedAttentionGuidance.execute(model, 3.0).result[0],
        "SteerPAG": pag.apply(model, 3.0, "auto", always),
        "SteerPAG, rows not shared": report.sharing(pag.apply(model, 3.0, "auto", always), False),
        "SteerPAG to 40 %": pag.apply(model, 3.0, "auto", Schedule(0.0, 0.4)),
        "SteerSEG": seg.apply(model, 3.0, 100.0, "auto", always),
        "SteerSLG": slg.apply(model, 3.0, "auto", always),
        "core SAG": SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0],
        "SteerSAG": sag.apply(model, 0.5, 2.0, always),
        "SteerAPG": apg.apply(model, 0.0, 15.0, -0.5, always),
        "SteerTCFG": tcfg.apply(model, 1.0, always),
        "SteerCFGPP": cfgpp.apply(model, 0.6, always),
        "naive PAG + SEG + two negatives": naive(model, 4),
        "PAG + SEG + two negatives": together(model),
        "PAG + SEG + two negatives + APG + TCFG": tcfg.apply(
            apg.apply(together(model), 0.0, 15.0, -0.5, always), 1.0, always
        ),
    }


def naive(model, count):
    """`count` predictions more, each in a forward of its own after the guider's."""
    import comfy.samplers

    def post_cfg(args):
        out = args["denoised"]
        for _ in range(count):
            call = args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
            out = out + (args["cond_denoised"] - comfy.samplers.calc_cond_batch(*call)[0]) * 0.1
        return out

    model = model.clone()
    model.set_model_sampler_post_cfg_function(post_cfg)
    return model


def measure(name, repeats):
    """(method, forwards, rows, FLOPs, bytes, time ratio to CFG, time ratio to core PAG), all but bytes per step."""
    import toy
    from torch.utils.flop_counter import FlopCounterMode

    label, make, chosen = MODELS[name]
    model, conds, size = make()
    kinds = {kind: m for kind, m in methods(model, conds).items() if chosen is None or kind in chosen}

    def run(kind):
        # a schedule whose steps lie on both sides of 40 %
        return toy.sample(kinds[kind], steps=STEPS, start=toy.noise(height=size, width=size), **conds)

    rows = {}
    for kind in kinds:
        with toy.count_forwards(model) as count, FlopCounterMode(display=False) as flops:
            run(kind)
        counted = (count.calls, count.rows, flops.get_total_flops())
        rows[kind] = *(n / STEPS for n in counted), peak(lambda k=kind: run(k))
    times = {kind: [] for kind in kinds}
    for i in range(repeats):
        for kind in kinds:
            print(f"\r{label}: round {i + 1} of {repeats}, {kind:<40}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            run(kind)
            times[kind].append(time.perf_counter() - start)
    print(file=sys.stderr)

    def ratio(kind, to):
        return statistics.median(a / b for a, b in zip(times[kind], times[to], strict=True))

    seconds = statistics.median(times["CFG"]) / STEPS
    return label, seconds, [(k, *rows[k], ratio(k, "CFG"), ratio(k, "core PAG")) for k in kinds]


def peak(run):
    """Bytes: the most that was allocated at once during `run`, beside what was there before."""
    from torch.profiler import profile

    with profile(profile_memory=True) as profiled:
        run()
    events = (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def table(label, seconds, rows):
    lines = [
        f"## {label}",
        "",
        f"Plain CFG takes {seconds:.3f} s per step here.",
        "",
        "| method | forwards per step | rows per step | GFLOPs per step | peak MB | time / CFG | time / core PAG |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, calls, count, flops, most, to_cfg, to_core in rows:
        cost = f"{calls:g} | {count:g} | {flops / 1e9:.2f} | {most / 2**20:.0f}"
        lines.append(f"| {kind} | {cost} | {to_cfg:.3f} | {to_core:.3f} |")
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
        "Made by `python tests/bench/guidance.py`. Forwards, rows, FLOPs and the peak of memory beside the weights are "
        "counted; times are medians of ratios, "
        f"methods interleaved, {args.repeats} rounds of {STEPS} steps, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}, fp32.",
        *(table(*measure(name, args.repeats)) for name in args.models),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
