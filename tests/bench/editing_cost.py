"""Cost of editing beside a source picture: FLOPs, time, memory and the largest tensor of a step, over plain CFG.

    python tests/bench/editing_cost.py [--side 64] [--repeats 3] [--models sd15 flux] [--bf16]

Networks with random weights at latents of side x side, one picture; every window is open. The host's attention is
PyTorch's, which makes no maps, as on a GPU. Per step:
    rows      of the network
    FLOPs     counted, over those of plain CFG: do not depend on the machine
    time      over that of plain CFG, the methods taking turns in one process, the median over the repeats: run it on a
              machine that does nothing else
    peak      MB that are allocated at once beside the weights, most of all;  grows  by how much with 3 steps for 1
    largest   MB of the largest tensor that is made
    maps      tensors with a place for each pair of a query and a key
Style Injection has two sources beside the picture, FluxSpace two texts; all others one source.
Writes tests/bench/editing_cost.md.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.guidance import peak  # noqa: E402
from bench.tables import write  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
WORDS, STEPS = 77, 3
SOURCE, EDIT = "a happy person, blue hair, a hat", "a sad person, red hair, a hat"
INTRO = (
    "# Cost of editing\n\nEach table says by which command it was made; what is measured is said at the top of "
    "`tests/bench/editing_cost.py`."
)
MID_FLUX = dict(hidden_size=1024, num_heads=8, depth=4, depth_single_blocks=8, context_in_dim=768, vec_in_dim=768)


def sd15(side, dtype):
    """(ModelPatcher, (queries, keys) of its attentions whose maps would be large)."""
    import toy

    places = [(side // part) ** 2 for part in (1, 2, 4, 8)]
    return toy.model(toy.SD15, dtype=dtype), {(n, m) for n in places if n > side for m in (n, WORDS)}


def flux(side, dtype):
    import comfy.model_base
    import toy

    image = (side // 2) ** 2
    keys = image + WORDS
    made = toy.model({**toy.FLUX, **MID_FLUX}, "flow", dtype, base=comfy.model_base.Flux)
    return made, {(keys, keys), (image, keys), (image, WORDS)}


MODELS = {
    "sd15": ("UNet of Stable Diffusion 1.5, full size", sd15),
    "flux": ("Flux, 1024 wide, 4 double and 8 single blocks", flux),
}


class Bench:
    """One network, with a source, and every method on it."""

    def __init__(self, name, side, dtype):
        import torch
        import toy
        from steer.models.lab.load import load_clip
        from steer.patches.shared.alignment import align
        from steer.patches.shared.trajectory import Trajectory, fingerprint
        from steer.patches.shared.words import encode

        self.name, self.side = name, side
        self.model, self.maps = MODELS[name][1](side, dtype)
        self.noise = partial(toy.noise, height=side, width=side)
        self.positive, self.negative, self.before, self.empty = (
            toy.text(seed, width=768, pooled_output=torch.randn(1, 768, generator=torch.Generator().manual_seed(seed)))
            for seed in (1, 2, 5, 6)
        )
        self.sigmas = toy.sigmas(self.model, STEPS)
        clean = 0.3 * self.noise(40)
        latents = torch.stack([clean + s * self.noise(50) for s in self.sigmas])
        self.path = Trajectory(self.sigmas, latents, fingerprint(self.model), self.before)
        clip = load_clip()
        self.alignment = align(*(encode(clip, text)[1] for text in (SOURCE, EDIT)), "refine")
        self.methods = dict(self.steered())

    def steered(self):
        """(name, ModelPatcher, the sampler's method where it is FlowEdit's)."""
        import torch
        from steer.patches.attention import (
            fluxspace,
            kvreuse,
            masactrl,
            plugandplay,
            prompttoprompt,
            styleinjection,
            unifiedattention,
        )
        from steer.patches.shared.schedule import Schedule

        model, path, always = self.model, self.path, Schedule()
        words = self.before, self.positive, [self.alignment]
        p2p = partial(prompttoprompt.edit, model, path, *words, cross_replace=1.0, self_replace=1.0)
        mask = torch.zeros(1, self.side, self.side)
        mask[:, self.side // 4 : -self.side // 4, self.side // 4 : -self.side // 4] = 1.0

        def unified(*shares, **more):
            texts = self.before, self.positive, self.alignment
            return unifiedattention.apply(model, *shares, "auto", always, 1.0, texts, **more), "DDCM"

        yield "plain CFG", (model, None)
        yield "Prompt-to-Prompt", (p2p(), None)
        yield "Prompt-to-Prompt, blended", (p2p(blend_words="hair"), None)
        yield "MasaCtrl", (masactrl.apply(model, path, 1.0, "auto", always), None)
        yield "MasaCtrl, all layers, masks", (
            masactrl.apply(model, path, 1.0, "0%-100%", always, None, mask, mask), None)
        yield "KV Reuse", (kvreuse.apply(model, path, mask, 0.0, "auto", always), None)
        yield "KV Reuse, attention scale 1", (kvreuse.apply(model, path, mask, 1.0, "auto", always), None)
        yield "Plug-and-Play", (plugandplay.apply(model, path, "auto", always, "auto", always), None)
        yield "FlowEdit (DDCM)", (model, "DDCM")
        yield "Unified Attention, layout", unified(1.0, 0.0, 1.0)
        yield "Unified Attention, textures", unified(0.0, 1.0, 0.0)
        yield "Unified Attention, eta 0.5, blended", unified(1.0, 0.5, 1.0, blend_words="hair")
        if self.name == "sd15":
            made = styleinjection.apply(model, path, replace(path), 0.75, 1.5, "auto", always)[0]
            yield "Style Injection", (made, None)
        else:
            columns = torch.zeros(1, WORDS)
            columns[0, 2:4] = 1.0
            made = fluxspace.apply(model, self.before, self.empty, columns, 5.0, 0.5, 0.5, "auto", always)
            yield "FluxSpace", (made, None)

    def run(self, kind, steps=1):
        import toy
        from steer.patches.inversion.flowedit import FlowEdit, guider

        model, method = self.methods[kind]
        sigmas = self.sigmas[[*range(steps), -1]]
        if method is None:
            start = self.path.latents[0] / self.sigmas[0]
            return toy.sample(model, positive=self.positive, negative=self.negative, start=start, sigmas=sigmas)
        latent = 0.3 * self.noise(40)
        pair = guider(model, self.before, self.positive, self.negative, 1.0, 5.0)
        return toy.sample(model, None, FlowEdit(method, 99), guider=pair, start=latent * 0, latent=latent,
                          sigmas=sigmas)


def tensors(run, pairs):
    """(bytes of the largest tensor that `run` makes, number of those whose last two sizes are one of `pairs`)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = maps = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.largest = max(self.largest, t.untyped_storage().nbytes())
                    self.maps += t.ndim > 2 and tuple(t.shape[-2:]) in pairs
            return out

    with Sizes() as seen:
        run()
    return seen.largest, seen.maps


def counted(bench, kind):
    """(rows, FLOPs, bytes at the peak of 1 step, bytes more with STEPS, largest tensor, maps)."""
    import torch
    import toy
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q, k, v, *args, **kwargs):  # which PyTorch does not count on CPUs
        return sdpa_flop_count(q, k, v)

    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    flops = FlopCounterMode(display=False, custom_mapping=on_cpu)
    with toy.count_forwards(bench.model) as count, flops:
        bench.run(kind)
    once, more = (peak(lambda n=steps: bench.run(kind, n)) for steps in (1, STEPS))
    largest, maps = tensors(lambda: bench.run(kind), bench.maps)
    return count.rows, flops.get_total_flops(), once, more - once, largest, maps


def measure(name, side, repeats, bf16):
    """The table of one network, as text."""
    import torch
    from comfy.ldm.flux import math
    from comfy.ldm.modules import attention

    for module in (attention, math):
        module.optimized_attention = attention.attention_pytorch
    bench = Bench(name, side, torch.bfloat16 if bf16 else torch.float32)
    found = {kind: counted(bench, kind) for kind in bench.methods}
    times = {kind: [] for kind in bench.methods}
    for i in range(repeats):
        for kind in bench.methods:
            print(f"\r{name}: round {i + 1} of {repeats}, {kind:<50}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            bench.run(kind)
            times[kind].append(time.perf_counter() - start)
    print(file=sys.stderr)
    plain, own = times["plain CFG"], found["plain CFG"][1]
    lines = [
        f"`editing_cost.py --side {side} --repeats {repeats} --models {name}{' --bf16' * bf16}`; "
        f"{torch.get_num_threads()} threads, {'bf16' if bf16 else 'fp32'}, plain CFG takes "
        f"{statistics.median(plain):.2f} s and {own / 1e9:.0f} GFLOPs per step.",
        "",
        "| method | rows | FLOPs / CFG | time / CFG | peak MB | grows MB | largest MB | maps |",
        "|---" * 8 + "|",
    ]
    for kind, (rows, flops, once, more, largest, maps) in found.items():
        ratio = statistics.median(a / b for a, b in zip(times[kind], plain, strict=True))
        memory = " | ".join(f"{n / 2**20:.3g}" for n in (once, more, largest))
        lines.append(f"| {kind} | {rows} | {flops / own:.3f} | {ratio:.2f} | {memory} | {maps} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which the methods take turns")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bf16", action="store_true", help="the networks in bf16, faster where a CPU has it")
    args = parser.parse_args()
    host.enter()
    host.load_pack()
    for name in args.models:
        title = f"{MODELS[name][0]}, latents of {args.side} x {args.side}"
        text = measure(name, args.side, args.repeats, args.bf16)
        print(text)
        write(RESULTS, INTRO, [title], {title: text})


if __name__ == "__main__":
    main()
