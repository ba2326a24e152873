"""What losses and measurements of the estimate do, on the lab's trained models.

    python tests/bench/lab_measurement.py [--portraits 32] [--sets 4] [--steps 20] [--bf16] [--tables 1 2 ...]

Rewarded: portraits under "a comic portrait", scored for a happy face, red hair and glasses. Every set has its noise.
    score   mean log-probability of the three by the reader, which is also the scorer
    found   share of the three that the reader finds;  contrast  standard deviation of the latents
Read: the same with CLIP Guidance, the text being the three; the lab's two encoders look and read.
    cosine  of what is seen and what is read;  found, contrast as above
Restored: held-out portraits from a measurement, under an empty prompt at cfg 1. Every set has portraits of its own.
    PSNR    to the portrait, in dB, both as the VAE renders them
    error   root mean square of what the operator says of the result, less the measurement
Pulled: towards a held-out portrait, under an empty prompt at cfg 1.
    PSNR    to it;  identity  similarity of the face;  colours  distance of the palettes, in 1/1000
Writes tests/bench/lab_measurement.md.
"""

import sys
from functools import cache, partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
INTRO = (
    "# Losses and measurements, on the lab\n\nEach table says by which command it was made; what the columns mean is "
    "said at the top of `tests/bench/lab_measurement.py`. Euler, norm unit."
)
WANTED = "a happy person, red hair, glasses"


class Lab:
    """Portraits, and pictures made from noise, for one lab model."""

    def __init__(self, which, portraits, first):
        import torch
        from steer.models.lab import data
        from steer.models.lab.load import load_model
        from steer.models.lab.reader import load_reader

        self.model, self.clip, self.vae = load_model(which)
        self.reader, self.which, self.first, self.size = load_reader(), which, first, portraits
        _, pictures = data.held_out(portraits, first)
        with torch.inference_mode():
            self.latent = self.vae.encode(torch.from_numpy(pictures).float() / 255)
        self.truth = self.show(self.latent)

    def show(self, latent):
        import torch

        with torch.inference_mode():
            return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)

    def made(self, model, steps, prompt="", cfg=1.0):
        import toy

        positive, negative = (self.clip.encode_from_tokens_scheduled(self.clip.tokenize(t)) for t in (prompt, ""))
        return toy.sample(
            model, cfg, steps=steps, positive=positive, negative=negative, start=toy.noise(self.first, self.size),
            sigmas=toy.sigmas(model, steps, "simple" if self.which == "dit" else "normal"),
        )


@cache
def lab(which, portraits, first):
    return Lab(which, portraits, first)


def pushed(strength, gradient="estimate", **more):
    from steer.patches.shared.energy import push

    return push(strength, gradient, **more)


def rewarded(lab, steps, options):
    from steer.nodes.lab.scorer import LabScorer
    from steer.patches.measurement import reward
    from steer.patches.shared.decode import decoder
    from steer.patches.shared.schedule import Schedule

    model, scorer = lab.model, LabScorer(WANTED, decoder(lab.vae), lab.reader)
    if options is not None:
        model = reward.apply(model, scorer, pushed(**options), Schedule())
    out = lab.made(model, steps, "a comic portrait", 2.5)
    import torch

    with torch.inference_mode():
        x = lab.show(out)
        score = lab.reader.score(x, WANTED)
    return {"score": score, "found": found(lab, x), "contrast": out.flatten(1).std(1)}


def found(lab, x):
    """Share of the three that the reader finds in pictures [B, 3, h, w]."""
    import torch

    return torch.tensor([
        (r["expression"][0] == "happy") + (r["hair_color"][0] == "red") + (r["glasses"][0] == "glasses")
        for r in lab.reader.read(x)
    ]) / 3


def guided_by_clip(lab, steps, options):
    import torch
    import torch.nn.functional as F
    from steer.models.lab.load import load_clip, load_vision
    from steer.patches.measurement import clipguidance
    from steer.patches.shared.schedule import Schedule

    model, clip, vision = lab.model, load_clip(), load_vision()
    if options is not None:
        model = clipguidance.apply(model, lab.vae, clip, vision, WANTED, pushed(**options), Schedule())
    out = lab.made(model, steps, "a comic portrait", 2.5)
    with torch.inference_mode():
        x = lab.show(out)
        seen = F.normalize(vision.encode_image(x.movedim(1, -1)).image_embeds.float(), dim=-1)
        read = F.normalize(clipguidance.pooled(clip, WANTED), dim=-1)
    return {"cosine": (seen * read).sum(1), "found": found(lab, x), "contrast": out.flatten(1).std(1)}


def operators(lab, name):
    import torch
    from steer.patches.measurement.operator import operator

    mask = torch.zeros(1, 128, 128)
    mask[..., :64] = 1
    return {
        "x4": lambda: operator("downsample", factor=4),
        "blur": lambda: operator("blur", sigma=4.0),
        "left half": lambda: operator("mask", mask=mask),
        "projection": lambda: operator("random projection", share=0.1),
        "grey": lambda: operator("grayscale"),
        "Fourier": lambda: operator("Fourier magnitude"),
    }[name]()


def restored(lab, steps, name, options):
    import torch
    from bench.lab_inversion_edit import psnr
    from steer.patches.measurement import measurement
    from steer.patches.shared.schedule import Schedule

    op, model = operators(lab, name), lab.model
    if options is not None:
        options = dict(options)
        mode, image = options.pop("mode", "soft"), lab.truth.movedim(1, -1)
        model = measurement.apply(model, op, pushed(**options), Schedule(), mode, image=image, vae=lab.vae)
    x = lab.show(lab.made(model, steps))
    with torch.inference_mode():
        return {"PSNR": psnr(x, lab.truth), "error": (op(x) - op(lab.truth)).square().flatten(1).mean(1).sqrt()}


def pulled(lab, steps, options):
    import torch
    from bench.lab_inversion_edit import psnr
    from steer.nodes.lab.scorer import LabScorer
    from steer.patches.measurement import imageguide
    from steer.patches.shared.decode import decoder
    from steer.patches.shared.schedule import Schedule

    model = lab.model
    if options is not None:
        options = dict(options)
        loss, eyes = options.pop("loss"), LabScorer(WANTED, decoder(lab.vae), lab.reader)
        image = lab.truth.movedim(1, -1)
        model = imageguide.apply(model, lab.vae, image, loss, pushed(**options), Schedule(0.0, 0.9), eyes)
    x = lab.show(lab.made(model, steps))
    with torch.inference_mode():
        faces = [lab.reader(each)[2] for each in (x, lab.truth)]
        colours = 1000 * imageguide.palette(x, lab.truth)
    return {"PSNR": psnr(x, lab.truth), "identity": (faces[0] * faces[1]).sum(1), "colours": colours}


REWARDED = {
    "off": None,
    **{
        f"{form}, strength {s:g}": dict(strength=s, gradient=form)
        for form in ("estimate", "network") for s in (0.1, 0.3, 1.0)
    },
}
RESTORED = {
    "off": None,
    "soft, estimate": dict(strength=1.0),
    "soft, network": dict(strength=1.0, gradient="network"),
    "soft, estimate, recurrence 2": dict(strength=1.0, recurrence=2),
}
HARD = {**RESTORED, "hard": dict(mode="hard", strength=1.0)}
PULLED = {
    "off": None,
    **{f"{loss}, strength 0.5": dict(loss=loss, strength=0.5) for loss in ("L2", "perceptual", "palette")},
}


def measured(which, run, settings, portraits, sets, steps):
    """Rows of one table."""
    import torch

    labs = [lab(which, portraits, 9000 + 1000 * n) for n in range(sets)]
    for name, options in settings.items():
        found = [run(each, steps, options=options) for each in labs]
        yield name, {column: float(torch.cat([each[column] for each in found]).mean()) for column in found[0]}


NAMES = {"unet": "Lab-UNet", "dit": "Lab-DiT"}
KNOWN = {"x4": HARD, "blur": RESTORED, "left half": HARD, "projection": HARD, "grey": HARD, "Fourier": RESTORED}
TABLES = [
    (f"Rewarded, {title}", ("score", "found", "contrast"), partial(measured, which, rewarded, REWARDED))
    for which, title in NAMES.items()
]
TABLES += [
    (f"Restored from {name}, {title}", ("PSNR", "error"),
     partial(measured, which, partial(restored, name=name), settings))
    for name, settings in KNOWN.items() for which, title in NAMES.items()
]
TABLES += [
    (f"Pulled, {title}", ("PSNR", "identity", "colours"), partial(measured, which, pulled, PULLED))
    for which, title in NAMES.items()
]
TABLES += [
    (f"Read, {title}", ("cosine", "found", "contrast"), partial(measured, which, guided_by_clip, REWARDED))
    for which, title in NAMES.items()
]


def main():
    size, numbers = arguments(__doc__, portraits=32, sets=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
