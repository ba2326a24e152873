"""What Temporal Alignment Guidance does to runs that are driven off, on the lab's trained models.

    python tests/bench/lab_temporal.py [--portraits 32] [--sets 4] [--steps 20] [--bf16] [--tables 1 2 ...]

Held-out portraits, each by its full prompt; every set has portraits and noise of its own. Euler, and at its usual cfg
    undisturbed
    high cfg  far above what the model is for
    reward    Reward Guidance, norm unit, for a happy face, red hair and glasses, so strong that it breaks pictures
    noise     added to x at every step, as in the paper's corrupted process: its share of the spread that x has there
    ancestral Euler whose fresh noise is as many times too large (s_noise); it has no form sample
    few steps
Columns
    gap   time gap: distance of the level that the predictor finds likeliest from the run's, in thousandths of the
          model's time, the mean over all steps but the first. This predictor is also the one that guides
    hits  share of the prompt's factors that the reader finds; fit, the mean log-probability that it gives them, 0 at
          best. Both without the three that a reward is for, whose share is found
    PSNR  to the drawn truth as the VAE renders it; faces differ in their proportions, so 25 dB is out of reach
    std   standard deviation of the latents, of the drawn portraits 1
Writes tests/bench/lab_temporal.md.
"""

import sys
from functools import cache, partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
INTRO = (
    "# Temporal alignment, on the lab\n\nEach table says by which command it was made; what the columns mean is said "
    "at the top of `tests/bench/lab_temporal.py`. Beside the form stands the strength."
)
REWARDED = dict(expression="happy", hair_color="red", glasses="glasses")
USUAL = {"unet": (5.0, "normal"), "dit": (4.0, "simple")}


@cache
def lab(which):
    """MODEL, CLIP, VAE, reader, time predictor."""
    from steer.models.lab.load import load_model, load_time
    from steer.models.lab.reader import load_reader

    return *load_model(which), load_reader(), load_time(which)


@cache
def portraits(which, count, first):
    """(Portraits, latents as the model works on them, pictures through the VAE)."""
    import torch
    from steer.models.lab import data

    model, _, vae, *_ = lab(which)
    found, pictures = data.held_out(count, first)
    with torch.inference_mode():
        latents = vae.encode(torch.from_numpy(pictures).float() / 255)
        drawn = vae.decode(latents).movedim(-1, 1).float().clamp(0, 1)
    return found, model.model.process_latent_in(latents), drawn


def noise(model, amount):
    """A MODEL whose every Euler step adds noise."""
    from dataclasses import dataclass

    import torch
    from steer.patches.shared.energy import Energy
    from steer.patches.shared.euler import next_sigma, signal
    from steer.patches.shared.steering import steer

    @dataclass(frozen=True)
    class Noise(Energy):
        amount: float = 0.0
        node = "SteerNoise"

        def energy(self, denoised, call, weight):
            s, s_next = call.level, next_sigma(call)
            if s_next == 0:
                return None
            a, generator = signal(call.run.sampling, s_next), torch.Generator().manual_seed(round(1e6 * s))
            spread = self.amount * (a**2 + s_next**2) ** 0.5
            return torch.randn(denoised.shape, generator=generator) * (spread / (1 - s_next / s))

    return steer(model, Noise(amount=amount))


def rewarded(model, vae, reader, strength):
    from steer.nodes.lab.scorer import LabScorer
    from steer.patches.measurement import reward
    from steer.patches.shared.decode import decoder
    from steer.patches.shared.energy import push
    from steer.patches.shared.schedule import Schedule

    scorer = LabScorer("a happy person, red hair, glasses", decoder(vae), reader)
    return reward.apply(model, scorer, push(strength), Schedule())


def run(which, count, first, steps, options, cfg=None, reward=0.0, corrupt=0.0, ancestral=0.0, few=None):
    """{column: [items]} of one set.  options: strength and form, or None."""
    import comfy.samplers
    import torch
    import toy
    from bench.lab_inversion_edit import psnr
    from steer.models.lab import evaluate
    from steer.models.lab.captions import caption
    from steer.models.lab.portrait import FACTORS
    from steer.models.lab.timing import gaps
    from steer.patches.measurement import temporalalignment as temporal
    from steer.patches.shared.energy import push
    from steer.patches.shared.schedule import Schedule

    model, clip, vae, reader, predictor = lab(which)
    known, truth, drawn = portraits(which, count, first)
    ours = rewarded(model, vae, reader, reward) if reward else model
    ours = noise(ours, corrupt) if corrupt else ours
    if options is not None:
        strength, form = options
        ours = temporal.apply(ours, predictor, form, push(strength, norm="none"), Schedule())
    usual, scheduler = USUAL[which]
    sigmas, seen = toy.sigmas(model, few or steps, scheduler), []

    def look(step, denoised, x, total):
        level = sigmas[step].expand(count)
        told = temporal.told(predictor, x, level, model.get_model_object("model_sampling"))
        seen.append(gaps(told, temporal.position(predictor.levels, level)))

    texts = [evaluate.conditioning(clip, [caption(p) for p in known]), evaluate.conditioning(clip, [""])]
    sampler = comfy.samplers.ksampler("euler_ancestral", {"s_noise": ancestral}) if ancestral else "euler"
    out = toy.sample(
        ours, cfg or usual, sampler, positive=texts[0], negative=texts[1], start=toy.noise(first, count),
        sigmas=sigmas, callback=look,
    )
    with torch.inference_mode():
        pictures = vae.decode(out).movedim(-1, 1).float().clamp(0, 1)
        names = [name for name in FACTORS if not (reward and name in REWARDED)]
        logits = dict(zip(FACTORS, reader(pictures)[0], strict=True))
        at = {name: torch.tensor([FACTORS[name].index(getattr(p, name)) for p in known]) for name in names}
        fit = torch.stack([logits[n].log_softmax(1).gather(1, at[n][:, None])[:, 0] for n in names])
        found = torch.stack([logits[n].argmax(1) == FACTORS[n].index(v) for n, v in REWARDED.items()])
        spread = model.model.process_latent_in(out).flatten(1).std(1) / truth.std()
        return {
            "gap": torch.stack(seen[1:]).mean(0), "fit": fit.mean(0), "PSNR": psnr(pictures, drawn), "std": spread,
            "hits": torch.stack([logits[n].argmax(1) == at[n] for n in names]).float().mean(0),
            "found": found.float().mean(0),
        }


SETTINGS = {
    "off": None,
    **{f"score {w:g}": (w, "score") for w in (0.5, 1.0, 2.0, 4.0)},
    **{f"sample {w:g}": (w, "sample") for w in (0.25, 0.5, 1.0)},
}


def measured(which, drive, portraits, sets, steps):
    """Rows of one table."""
    import torch

    for name, options in SETTINGS.items():
        if options and options[1] == "sample" and "ancestral" in drive:
            continue
        found = [run(which, portraits, 14000 + 1000 * n, steps, options, **drive) for n in range(sets)]
        yield name, {column: float(torch.cat([each[column] for each in found]).mean()) for column in found[0]}


COLUMNS = ("gap", "hits", "fit", "PSNR", "std")
DRIVEN = {
    "Undisturbed": {}, "High cfg, 12": dict(cfg=12.0), "Reward, 2": dict(reward=2.0), "Noise, 0.2": dict(corrupt=0.2),
    "Ancestral, 1.5": dict(ancestral=1.5), "Three steps": dict(few=3),
}
TABLES = [
    (f"{what}, {title}", COLUMNS + ("found",) * ("reward" in drive), partial(measured, which, drive))
    for what, drive in DRIVEN.items() for which, title in (("unet", "Lab-UNet"), ("dit", "Lab-DiT"))
]


def main():
    size, numbers = arguments(__doc__, portraits=32, sets=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)


if __name__ == "__main__":
    main()
