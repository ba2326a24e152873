"""How exactly inverted portraits come back under guidance on the lab's trained models, and what each method costs.

    python tests/bench/lab_inversion.py [--portraits 32] [--sets 4] [--steps 20] [--tables 1 2 3 4]

Held-out portraits are inverted under their captions and drawn again under the same captions, at cfg 5. Per method:
    PSNR        to the portrait as the VAE renders it, in dB: mean and standard deviation over the portraits; per set
    rows        of the network per picture and step, in finding and drawing, without the inversion; one with a backward
                pass counts 3
    kept        numbers that the method keeps per picture and step, in system memory
Of a run with the source beside the target, of four portraits:
    time        as a multiple of plain CFG's
    10 steps    MB of tensors that the run made and that live in its last step; so of 40 steps
Writes the chosen tables into tests/bench/lab_inversion.md.
"""

import gc
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_name("lab_inversion.md")
CFG = 5.0
METHODS = ("ddim", "npi", "null-text", "direct", "fixed-point", "fixed-point+npi", "fixed-point+direct")
INTRO = (
    "# How inverted portraits come back on the lab\n\nEach table says by which command it was made; what the columns "
    f"mean is said at the top of `tests/bench/lab_inversion.py`. With euler at cfg {CFG:g}. The first four methods "
    "begin with DDIM inversion, as in the papers; null-text has the node's defaults."
)


class Lab:
    """Inverted portraits of one set: what is drawn of them, and how near it is."""

    def __init__(self, which, portraits, first, steps):
        import torch
        import toy
        from bench.lab_guidance import lab
        from steer.models.lab import data
        from steer.models.lab.captions import caption

        (self.model, self.clip, self.vae), _ = lab(which)
        people, pictures = data.held_out(portraits, first)
        self.size = portraits
        self.sigmas = toy.sigmas(self.model, steps, "normal" if which == "unet" else "simple")
        self.positive, self.negative = self.text([caption(p) for p in people]), self.text([""] * portraits)
        with torch.inference_mode():
            self.latent = self.vae.encode(torch.from_numpy(pictures).float() / 255)
            self.drawn = self.vae.decode(self.latent)
        self.paths = {}

    def text(self, prompts):
        import torch

        both = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))[0] for prompt in prompts]
        pooled = torch.cat([options["pooled_output"] for _, options in both])
        return [[torch.cat([context for context, _ in both]), {"pooled_output": pooled}]]

    def path(self, method):
        import torch
        from steer.patches.inversion import invert

        if method not in self.paths:
            with torch.inference_mode():
                self.paths[method] = invert.invert(self.model, self.positive, self.latent, self.sigmas, method)
        return self.paths[method]

    def sample(self, trajectory, model=None, negative=None, cfg=CFG, **options):
        import toy
        from steer.patches.inversion.invert import InvertedNoise

        start = InvertedNoise(trajectory, self.model).generate_noise({"samples": self.latent})
        negative = self.negative if negative is None else negative
        options = dict(positive=self.positive, negative=negative, start=start, latent=self.latent, **options)
        return toy.sample(model or self.model, cfg, sigmas=trajectory.sigmas, **options)

    def back(self, method, **options):
        """(PSNR of each portrait [B], numbers kept per picture and step). options: of null-text."""
        import torch
        from steer.patches.inversion import directinversion, negativepromptinversion, nulltext
        from steer.patches.shared.schedule import Schedule

        trajectory = self.path("fixed-point" if "fixed-point" in method else "ddim / euler")
        model, negative, kept = self.model, None, 0
        if "npi" in method:
            negative = negativepromptinversion.apply(self.positive)
        elif method == "null-text":
            with torch.inference_mode():
                negative = nulltext.apply(model, trajectory, self.negative, CFG, **options)
            kept = negative[0][0][0].numel()
        elif "direct" in method:
            model = directinversion.apply(model, trajectory, 1.0, Schedule())
            kept = self.latent[0].numel()
        out = self.sample(trajectory, model, negative)
        with torch.inference_mode():
            error = (self.vae.decode(out) - self.drawn).square().flatten(1).mean(1)
        return -10 * error.log10(), kept


def work(lab, method):
    """(PSNR [B], rows per picture and step, numbers kept)."""
    import torch
    import toy

    again = 0

    def backward(module, given, out):
        nonlocal again
        again += out.shape[0] if torch.is_grad_enabled() else 0

    handle = lab.model.model.diffusion_model.register_forward_hook(backward)
    lab.path("fixed-point" if "fixed-point" in method else "ddim / euler")  # found before, for all alike
    try:
        with toy.count_forwards(lab.model) as count:
            psnr, kept = lab.back(method)
    finally:
        handle.remove()
    return psnr, (count.rows + 2 * again) / lab.size / (len(lab.sigmas) - 1), kept


def beside(lab, repeats=5):
    """Seconds of a run with the source beside it as a multiple of the plain run's: medians, interleaved."""
    from steer.patches.inversion import directinversion
    from steer.patches.shared.schedule import Schedule

    trajectory, times = lab.path("ddim / euler"), {"plain": [], "beside": []}
    models = {"plain": lab.model, "beside": directinversion.apply(lab.model, trajectory, 1.0, Schedule())}
    for _ in range(repeats):
        for name, model in models.items():
            began = time.perf_counter()
            lab.sample(trajectory, model)
            times[name].append(time.perf_counter() - began)
    return median(times["beside"]) / median(times["plain"])


def held(lab):
    """Bytes of live tensors in the last step of a run with the source beside it, beyond those before the run."""
    import torch
    from steer.patches.inversion import directinversion
    from steer.patches.shared.schedule import Schedule

    trajectory, seen = lab.path("ddim / euler"), []
    model = directinversion.apply(lab.model, trajectory, 1.0, Schedule())

    def live():
        gc.collect()
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                 for t in gc.get_objects() if type(t) is torch.Tensor}
        return sum(found.values())

    before = live()
    lab.sample(trajectory, model, callback=lambda i, D, x, n: seen.append(live() - before) if i == n - 1 else None)
    return seen[0]


def reconstruction(which, portraits, sets, steps):
    """Rows of the table of one model."""
    import torch

    labs = [Lab(which, portraits, 5000 + 1000 * i, steps) for i in range(sets)]
    for method in METHODS:
        found = [work(lab, method) for lab in labs]
        psnr = torch.cat([each for each, _, _ in found])
        rows, kept = found[0][1:]
        yield method, {
            "PSNR": f"{float(psnr.mean()):.1f} ± {float(psnr.std()):.1f}",
            "per set": ", ".join(f"{float(each.mean()):.1f}" for each, _, _ in found),
            "rows": f"{rows:.1f}",
            "kept": str(kept),
        }


def rates(portraits, sets, steps):
    """Null-text's 10 iterations at other rates; the paper's is 0.01."""
    import torch

    labs = [Lab("unet", portraits, 5000 + 1000 * i, steps) for i in range(sets)]
    for lr in (0.01, 0.03, 0.1):
        yield f"lr {lr:g}", {"PSNR": torch.cat([lab.back("null-text", lr=lr)[0] for lab in labs]).mean()}


def cost(**size):
    for which in ("unet", "dit"):
        few, many = (Lab(which, 4, 5000, steps) for steps in (10, 40))
        memory = {f"{len(lab.sigmas) - 1} steps": held(lab) / 2**20 for lab in (few, many)}
        yield which, {"time": beside(few), **memory}


COLUMNS = ("PSNR", "per set", "rows", "kept")
TABLES = (
    ("Reconstruction, Lab-UNet", COLUMNS, partial(reconstruction, "unet")),
    ("Reconstruction, Lab-DiT", COLUMNS, partial(reconstruction, "dit")),
    ("The source beside the target", ("time", "10 steps", "40 steps"), cost),
    ("Null-text inversion over its rate, Lab-UNet", ("PSNR",), rates),
)


def main():
    size, numbers = arguments(__doc__, portraits=32, sets=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".2f")


if __name__ == "__main__":
    main()
