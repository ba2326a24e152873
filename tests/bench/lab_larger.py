"""Pictures half as large again as those the lab's models were trained on: at once, and in two passes.

    python tests/bench/lab_larger.py [--portraits 6] [--seeds 2] [--steps 10] [--tables 1 2]

Captions of held-out portraits, latents of 24 x 24 where training had 16 x 16. In two passes the small picture is drawn,
scaled up by 1.5, put under noise and drawn on from there. How much noise is said as noise / signal: its level over that
of the latents (their deviation is 0.4 in Lab-UNet and 1 in Lab-DiT), and as KSampler's denoise.
    found   share of the caption's factors that the reader finds, the picture scaled to 128 x 128
    alike   PSNR of that picture to the small one, in dB
    detail  mean of what is lost by scaling to 128 x 128 and back, in thousandths
Writes tests/bench/lab_larger.md.
"""

import math
import sys
from functools import cache, partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS, CFG, SIDE, LARGER = Path(__file__).with_suffix(".md"), 2.5, 128, 192
COLUMNS = ("denoise", "found", "alike", "detail")
RATIOS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # noise / signal
SHIFTS = (3.0,)  # of the flow model's noise levels, times its own
INTRO = (
    "# Larger than trained, on the lab\n\nEach table says by which command it was made; what the columns mean is said "
    f"at the top of `tests/bench/lab_larger.py`. Cfg {CFG}, euler. The lab proves no looks on other models."
)


@cache
def lab(which, portraits):
    from steer.models.lab import data
    from steer.models.lab.captions import caption
    from steer.models.lab.evaluate import conditioning
    from steer.models.lab.load import load_model
    from steer.models.lab.reader import load_reader

    model, clip, vae = load_model(which)
    people, _ = data.held_out(portraits, 9000)
    texts = conditioning(clip, [caption(p) for p in people]), conditioning(clip, [""] * portraits)
    return model, vae, load_reader(), people, texts


def scaled(x, side):
    from torch.nn.functional import interpolate

    return interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def drawn(which, portraits, seed, steps, side=SIDE, picture=None, ratio=None, shift=1.0):
    """Pictures [B, 3, side, side].

    picture, ratio: what is drawn again, from that noise / signal.  shift: of a flow model, times its own.
    """
    import torch
    import toy
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    model, vae, _, _, (positive, negative) = lab(which, portraits)
    if shift != 1.0:
        own = model.get_model_object("model_sampling").shift + math.log(shift)
        model = ModelSamplingFlux().patch(model, own, own, 1024, 1024)[0]
    sigmas = toy.sigmas(model, steps, "simple" if which == "dit" else "normal")
    start = torch.randn(portraits, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    latent = None
    if picture is not None:
        with torch.inference_mode():
            latent = vae.encode(picture.movedim(1, -1))
        first = level(which, ratio)
        sigmas = torch.cat((sigmas.new_tensor([first]), sigmas[sigmas < 0.9 * first]))
    x = toy.sample(model, CFG, positive=positive, negative=negative, start=start, latent=latent, sigmas=sigmas)
    with torch.inference_mode():
        return vae.decode(x).movedim(-1, 1).float().clamp(0, 1)


def level(which, ratio):
    """The sigma of a noise / signal."""
    from steer.models.lab.load import LATENT_STD

    return ratio * LATENT_STD if which == "unet" else ratio / (1 + ratio)


def denoise(which, portraits, ratio):
    """The share of the steps that are below that level."""
    import toy

    sigmas = toy.sigmas(lab(which, portraits)[0], 200, "simple" if which == "dit" else "normal")[:-1]
    return float((sigmas <= level(which, ratio)).float().mean())


def figures(which, portraits, x, small):
    import torch
    from bench.lab_inversion_edit import psnr
    from steer.models.lab.portrait import FACTORS

    _, _, reader, people, _ = lab(which, portraits)
    low = scaled(x, SIDE)
    with torch.inference_mode():
        read = reader.read(low)
    hits = [r[f][0] == getattr(p, f) for r, p in zip(read, people, strict=True) for f in FACTORS]
    return {
        "found": sum(hits) / len(hits),
        "alike": float(psnr(low, small).mean()),
        "detail": 1000 * float((x - scaled(low, x.shape[-1])).abs().mean()),
    }


def table(which):
    def rows(portraits, seeds, steps):
        size = which, portraits
        small = [drawn(*size, seed, steps) for seed in range(seeds)]
        up = [scaled(x, LARGER) for x in small]

        def row(name, draw, share=1.0):
            found = [figures(*size, draw(seed), small[seed]) for seed in range(seeds)]
            return name, {"denoise": share, **{c: sum(f[c] for f in found) / seeds for c in COLUMNS[1:]}}

        yield row("as trained", small.__getitem__)
        yield row("scaled up", up.__getitem__, 0.0)
        yield row("at once", lambda seed: drawn(*size, seed, steps, LARGER))
        for shift in SHIFTS if which == "dit" else ():
            yield row(f"at once, shift x {shift:g}", partial(drawn, *size, steps=steps, side=LARGER, shift=shift))
        for ratio in RATIOS:
            again = [drawn(*size, seed + 100, steps, LARGER, up[seed], ratio) for seed in range(seeds)]
            yield row(f"two passes, noise / signal {ratio:g}", again.__getitem__, denoise(*size, ratio))

    return rows


TABLES = [(f"Lab-{name}", COLUMNS, table(which)) for which, name in (("unet", "UNet (eps)"), ("dit", "DiT (flow)"))]


def main():
    size, numbers = arguments(__doc__, portraits=6, seeds=2, steps=10)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".3g")


if __name__ == "__main__":
    main()
