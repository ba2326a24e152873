"""Prompt-to-Prompt as attention with other values against the paper's maps: time and memory on the CPU.

    python tests/bench/p2p.py [--side 64] [--repeats 5]

The attentions that the method edits in one evaluation of Stable Diffusion 1.5 at latents of side x side, one picture:
attention to 77 words in its 16 layers, and attention within the picture where it has at most a quarter of the latent's
places. Each way runs in a process of its own.
    seconds  of the edited attentions, the best of the repeats
    MiB      by which the process grows at its peak
Their outputs are compared by their root mean square, layer by layer.
Writes tests/bench/p2p.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import write  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
HEADS, WORDS = 8, 77
LEVELS = ((1, 320, 5), (2, 640, 5), (4, 1280, 5), (8, 1280, 1))  # side divided by, channels, layers
WAYS = ("maps", "values")


def calls(side, words):
    """[(layer, source, target)] of one evaluation, AttnCalls with random contents."""
    import torch
    from steer.patches.shared.attention import AttnCall
    from steer.patches.shared.layers import Layer

    for part, channels, count in LEVELS:
        places = (side // part) ** 2
        keys = WORDS if words else places
        if not words and part == 1:
            continue
        for n in range(count):
            draw = torch.Generator().manual_seed(1000 * part + n)
            pair = [
                AttnCall(
                    *(torch.randn(1, size, channels, generator=draw) for size in (places, keys, keys)), HEADS,
                    Layer("output", n), "cross" if words else "self", text=(0, None if words else 0),
                    shape=(1, 4, side, side),
                )
                for _ in range(2)
            ]
            yield pair


def by_maps(source, target, edit):
    import torch

    def map_of(call):
        q, k = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (call.q, call.k))
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    a = map_of(source)
    if target.kind == "cross":
        a = edit.c * (edit.alpha * (a @ edit.M) + (1 - edit.alpha) * map_of(target))
    v = target.v.unflatten(2, (HEADS, -1)).transpose(1, 2)
    return torch.matmul(a, v).transpose(1, 2).flatten(2)


def one(way, side, repeats):
    """Figures of one way, in this process."""
    import torch
    from comfy.ldm.modules import attention
    from steer.patches.attention.prompttoprompt import CrossReplace, SelfReplace
    from steer.patches.shared.attention import plain

    attention.optimized_attention = attention.attention_pytorch  # which makes no maps, as on a GPU
    draw = torch.Generator().manual_seed(7)
    alpha = (torch.arange(WORDS) % 5 > 0).float()[None]
    cross = CrossReplace(M=torch.eye(WORDS)[None], alpha=alpha, c=torch.rand(1, WORDS, generator=draw) + 0.5,
                         c_s=torch.ones(1, WORDS))
    edits = [(cross, list(calls(side, True))), (SelfReplace(), list(calls(side, False)))]

    def run(edits):
        for edit, pairs in edits:
            for source, target in pairs:
                if way == "maps":
                    yield by_maps(source, target, edit)
                else:
                    yield edit.edit(target, (source,), plain, None, 1.0, "positive")

    small = [(edit, pairs[-1:]) for edit, pairs in edits]
    with torch.inference_mode():
        list(run(small))
        before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        for _ in range(repeats):
            start = time.perf_counter()
            sums = [float(out.double().square().mean().sqrt()) for out in run(edits)]
            seconds.append(time.perf_counter() - start)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(seconds), "MiB": grown / 1024, "sums": sums}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        host.enter()
        host.load_pack()
        print(json.dumps(one(given.way, given.side, given.repeats)))
        return
    own = [sys.executable, __file__, "--side", str(given.side), "--repeats", str(given.repeats)]
    found = {}
    for way in WAYS:
        done = subprocess.run([*own, "--way", way], capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.strip().splitlines()[-1])
    sums = [found[way]["sums"] for way in WAYS]
    error = max(abs(a - b) / abs(a) for a, b in zip(*sums, strict=True))
    lines = [f"`p2p.py --side {given.side} --repeats {given.repeats}`", "", "| way | seconds | MiB |", "|---|---|---|"]
    lines += [f"| {way} | {found[way]['seconds']:.3f} | {found[way]['MiB']:.0f} |" for way in WAYS]
    lines += ["", f"The outputs' sizes differ by {error:.0e} at most."]
    title = f"Latents of {given.side} x {given.side}"
    intro = "# Prompt-to-Prompt: maps against values\n\nWhat is measured is said at the top of `tests/bench/p2p.py`."
    write(RESULTS, intro, [title], {title: "\n".join(lines)})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
