"""Cost of IP-Adapter on the SD1.5 UNet at full size: FLOPs, memory and time of a step against plain CFG.

    python tests/bench/adapter.py [--repeats 3] [--size 64] [--steps 4] [--bf16]

    every step   the same attention by the host's hooks, with keys and values made from the tokens at every step
FLOPs are counted (torch.utils.flop_counter). Memory is the peak of what a run allocates beside the weights
(torch.profiler). Times are medians of ratios to plain CFG, the ways taking turns in one process; weights are random,
which costs the same. Writes tests/bench/adapter.md.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402

RESULTS = Path(__file__).with_name("adapter.md")
HIDDEN = (320,) * 2 + (640,) * 2 + (1280,) * 5 + (640,) * 3 + (320,) * 3 + (1280,)
TEXT = 768


def ways(model):
    """{way: (ModelPatcher, tokens)}."""
    from identity import oracle
    from identity.by_hand import encoder, pictures
    from steer.models.identity import adapter
    from steer.patches.identity import ipadapter
    from steer.patches.shared.schedule import Schedule

    found = {"CFG": (model, 0)}
    for variant in ("base", "plus"):
        made = adapter.from_state_dict(oracle.flat(oracle.file(variant, HIDDEN, TEXT)), variant)
        steered = ipadapter.apply(
            model, made, 1.0, "linear", "auto", "concat", "as trained", Schedule(), pictures(), encoder()
        )
        found[f"SteerIPAdapter, {variant}"] = steered, made.tokens
    found["every step"] = every_step(model, made), made.tokens
    return found


def every_step(model, adapter):
    """The host's hooks with two projections in every layer of every step."""
    import torch
    from comfy.ldm.modules.attention import optimized_attention
    from steer.patches.shared.reference import places

    tokens = torch.randn(2, adapter.tokens, adapter.width, generator=torch.Generator().manual_seed(0))
    hooked = model.clone()

    def replacement(layer):
        def replace(q, k, v, extra):
            e = tokens.to(q).repeat_interleave(len(q) // 2, 0)
            heads = extra["n_heads"]
            out = optimized_attention(q, k, v, heads)
            return out + optimized_attention(q, layer["to_k_ip"](e), layer["to_v_ip"](e), heads)

        return replace

    for (block, depth), layer in zip(places(model, adapter), adapter.patcher.model.layers, strict=True):
        hooked.set_model_attn2_replace(replacement(layer), *block, depth)
    return hooked


def measure(repeats, size, steps, bf16):
    """Seconds of a plain step, and (way, tokens, GFLOPs per step, peak bytes, time ratio) of each."""
    import torch
    import toy
    from bench.guidance import peak
    from torch.utils.flop_counter import FlopCounterMode

    model = toy.model(toy.SD15, dtype=torch.bfloat16 if bf16 else torch.float32)
    conds = dict(positive=toy.text(1, width=TEXT), negative=toy.text(2, width=TEXT))
    found = ways(model)

    def run(way):
        return toy.sample(found[way][0], steps=steps, start=toy.noise(height=size, width=size), **conds)

    rows, times = {}, {way: [] for way in found}
    for way, (_, tokens) in found.items():
        with FlopCounterMode(display=False) as flops:
            run(way)
        rows[way] = tokens, flops.get_total_flops() / steps / 1e9, peak(lambda w=way: run(w))
    for n in range(repeats):
        for way in found:
            print(f"\rround {n + 1} of {repeats}, {way:<30}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            run(way)
            times[way].append(time.perf_counter() - start)
    print(file=sys.stderr)
    ratios = {w: statistics.median(a / b for a, b in zip(times[w], times["CFG"], strict=True)) for w in found}
    return statistics.median(times["CFG"]) / steps, [(way, *rows[way], ratios[way]) for way in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which the ways take turns")
    parser.add_argument("--size", type=int, default=64, help="side of the latent")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run")
    parser.add_argument("--bf16", action="store_true", help="the UNet in bf16, faster where a CPU has it")
    args = parser.parse_args()
    host.enter()
    host.load_pack()
    import torch

    seconds, rows = measure(args.repeats, args.size, args.steps, args.bf16)
    command = f"python tests/bench/adapter.py --repeats {args.repeats} --size {args.size} --steps {args.steps}"
    command += " --bf16" * args.bf16
    lines = [
        "# Cost of IP-Adapter",
        "",
        f"Made by `{command}`: the UNet of SD1.5 at full size, random weights, {8 * args.size} pixels, positive and "
        f"negative. Plain CFG takes {seconds:.2f} s per step here ({torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}, {'bf16' if args.bf16 else 'fp32'}).",
        "",
        "| | tokens | GFLOPs per step | peak MB beside the weights | time / CFG |",
        "|---|---|---|---|---|",
        *(f"| {way} | {tokens or '-'} | {flops:.1f} | {most / 2**20:.0f} | {ratio:.3f} |"
          for way, tokens, flops, most, ratio in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
