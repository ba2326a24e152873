"""Inversion: what comes back, how exactly, on which models; and that the host's own way does not get there."""

from functools import cache

import comfy.model_management
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import FlipSigmas
from steer.patches.inversion import invert

MEAN = toy.text(1, tokens=1)


@cache
def calm(kind="eps", dtype=torch.float32):
    """A random network that changes slowly with its input, as trained ones do."""
    model = toy.flux() if kind == "flux" else toy.model(kind=kind, dtype=dtype)
    network = model.model.diffusion_model
    last = network.final_layer.linear if kind == "flux" else network.out[-1]
    with torch.no_grad():
        last.weight *= 0.2
    return model


def clean(model, batch=1, height=8, width=8):
    """A latent as VAE Encode gives it."""
    return model.model.process_latent_out(0.5 * toy.noise(40, batch, height, width))


def inverted(model, latent=None, method="fixed-point", steps=6, iterations=5, positive=toy.POSITIVE, **options):
    latent = clean(model) if latent is None else latent
    sigmas = options.pop("sigmas", None)
    sigmas = toy.sigmas(model, steps) if sigmas is None else sigmas
    with torch.inference_mode():
        return invert.invert(model, positive, latent, sigmas, method, iterations, **options)


def back(model, trajectory, latent, positive=toy.POSITIVE, cfg=1.0):
    """The latent that SamplerCustomAdvanced draws from the NOISE, beside `latent`."""
    start = invert.InvertedNoise(trajectory, model).generate_noise({"samples": latent})
    options = dict(latent=latent, sigmas=trajectory.sigmas, positive=positive, cfg=cfg)
    return toy.sample(model, start=start, **options)


def decibel(a, b):
    return float(20 * torch.log10(b.abs().max() / (a - b).square().mean().sqrt()))


def round_trip(model, **options):
    latent, positive = clean(model), options.get("positive", toy.POSITIVE)
    return decibel(back(model, inverted(model, latent, **options), latent, positive), latent)


def test_a_gaussian_comes_back_better_with_more_steps_and_far_better_from_the_fixed_point():
    model = toy.gaussian()
    options = dict(positive=MEAN, iterations=6)
    plain, fixed = (
        [round_trip(model, method=method, steps=n, **options) for n in (10, 28, 50)]
        for method in ("ddim / euler", "fixed-point")
    )
    assert plain == sorted(plain) and fixed == sorted(fixed)
    assert all(better > worse + 20 for better, worse in zip(fixed, plain, strict=True))
    iterations = [round_trip(model, steps=20, positive=MEAN, iterations=n) for n in (1, 3, 6)]
    assert iterations == sorted(iterations)


def test_the_noise_is_where_the_exact_ode_leads():
    """Of Gaussian data it is x(s) = m + (x - m) sqrt(1 + s^2 / std^2); RF-Solver's step is of second order."""
    model, std = toy.gaussian(), 0.5
    latent = clean(model)
    x = model.model.process_latent_in(latent)
    m = 4 * MEAN[0][0].mean().tanh()

    def error(method, steps):
        found = inverted(model, latent, method, steps, 8, MEAN, sigmas=torch.linspace(2.0, 0.0, steps + 1))
        exact = m + (x - m) * (1 + 4 / std**2) ** 0.5
        return float((found.latents[0] - exact).abs().max())

    first, second = (error("ddim / euler", n) for n in (40, 80))
    assert 1.5 < first / second < 2.4
    first, second = (error("rf-solver", n) for n in (5, 10))
    assert first / second > 3.0
    assert second < error("ddim / euler", 10) / 4


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "flux"])
def test_it_comes_back_on_every_kind_of_model(kind):
    model = calm(kind)
    sigmas = toy.sigmas(model, 10)[-7:]
    exact = round_trip(model, iterations=10, sigmas=sigmas)
    assert exact > 60
    assert exact > round_trip(model, method="ddim / euler", sigmas=sigmas) + 20


def test_it_reaches_sigma_1_of_a_flow_where_the_host_divides_by_0():
    model = calm("flux")
    latent, sigmas = clean(model), toy.sigmas(model, 6, "simple")
    assert sigmas[0] == 1.0
    flipped = FlipSigmas.execute(sigmas)[0]
    up = toy.sample(model, 1.0, latent=latent, start=torch.zeros_like(latent), sigmas=flipped)
    assert not up.isfinite().any()
    again = toy.sample(model, 1.0, latent=up, start=torch.zeros_like(latent), sigmas=sigmas)
    assert again.isnan().all()
    trajectory = inverted(model, latent, iterations=10, sigmas=sigmas)
    assert trajectory.latents.isfinite().all()
    assert decibel(back(model, trajectory, latent), latent) > 60
    assert torch.equal(invert.start_latent(trajectory, model), model.model.process_latent_out(trajectory.latents[0]))


def test_the_trajectory_is_what_the_sampler_passes_through():
    model = calm()
    latent = clean(model)
    trajectory = inverted(model, latent, iterations=15, sigmas=toy.sigmas(model, 10)[-7:])
    passed = []
    sampler = comfy.samplers.ksampler("euler")
    start = invert.InvertedNoise(trajectory, model).generate_noise({"samples": latent})
    toy.sample(model, 1.0, sampler, latent=latent, start=start, sigmas=trajectory.sigmas,
               callback=lambda i, D, x, n: passed.append(x.clone()))
    for x, z in zip(passed, trajectory.latents, strict=False):
        assert torch.allclose(x, z, atol=1e-4 * float(z.std()))
    assert torch.equal(trajectory.source, model.model.process_latent_in(latent))


@pytest.mark.parametrize("kind, scheduler", [("eps", "normal"), ("eps", "karras"), ("v", "normal"), ("flow", "normal")])
def test_noise_latent_and_any_latent_beside_the_noise_start_alike(kind, scheduler):
    """Partly noised too, where the latent shows through the noise."""
    model = calm(kind)
    latent = clean(model)
    for sigmas in (toy.sigmas(model, 5, scheduler)[1:], toy.sigmas(model, 5, scheduler)[-3:]):
        trajectory = inverted(model, latent, sigmas=sigmas)
        ends = [back(model, trajectory, other) for other in (latent, torch.zeros_like(latent), 3 * clean(model) + 1)]
        silent = torch.zeros_like(latent)
        ends.append(toy.sample(model, 1.0, start=silent, sigmas=sigmas, latent=invert.start_latent(trajectory, model)))
        for end in ends[1:]:
            assert decibel(end, ends[0]) > 80


def test_a_batch_is_as_many_inversions():
    model = calm()
    latent = clean(model, 2, 9, 11)
    both = inverted(model, latent)
    for i in range(2):
        alone = inverted(model, latent[i : i + 1])
        assert torch.allclose(both.latents[:, i : i + 1], alone.latents, atol=1e-4 * float(alone.latents.std()))
    assert torch.equal(both.latents, inverted(model, latent).latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    model = calm(dtype=dtype)
    assert inverted(model, steps=3, iterations=1).latents.isfinite().all()


def test_progress_and_previews_are_of_the_clean_estimate_and_an_interrupt_leaves_nothing():
    model = calm()
    seen = []
    inverted(model, method="ddim / euler", callback=lambda i, D, x, n: seen.append((i, D.clone(), x.clone(), n)))
    assert [(i, n) for i, _, _, n in seen] == [(i, 6) for i in range(6)]
    sigmas = toy.sigmas(model, 6).flip(0)
    for (_, D, x, _), s, t, before in zip(seen[1:], sigmas[1:], sigmas[2:], seen, strict=False):
        assert torch.allclose(x, before[2] + (t - s) * (before[2] - D) / s, atol=1e-4 * float(x.std()))
    plain = toy.sample(model, steps=2)

    def interrupt(i, D, x, n):
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inverted(model, callback=interrupt)
    assert torch.equal(toy.sample(model, steps=2), plain)


@pytest.mark.parametrize("says, options", [
    ("the latent is empty, there is no picture in it", dict(latent=torch.zeros(1, 4, 16, 16))),
    ("there are 0 steps in the sigmas", dict(sigmas=torch.tensor([0.0]))),
    ("the sigmas end at 1; they must end at 0", dict(sigmas=torch.tensor([4.0, 2.0, 1.0]))),
    ("the sigmas must fall with every step; .* no FlipSigmas", dict(sigmas=torch.tensor([0.0, 1.0, 2.0]))),
    ("the sigmas must fall with every step", dict(sigmas=torch.tensor([2.0, 2.0, 0.0]))),
    ("iterations 0 must be a finite number from 1 to 100", dict(iterations=0)),
])
def test_nonsense_is_refused_before_anything_runs(says, options):
    model = calm()
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerInvert: {says}"):
        inverted(model, **options)
    assert count.calls == 0


def test_noise_of_another_size_is_refused():
    model = calm()
    trajectory = inverted(model)
    with pytest.raises(ValueError, match=r"SteerInvert: the inverted noise has shape \(1, 4, 8, 8\), .* \(1, 4, 4, 8"):
        back(model, trajectory, clean(model, 1, 4, 8))


@pytest.mark.parametrize("which, scheduler", [("unet", "normal"), ("dit", "simple")])
def test_from_picture_to_picture_in_the_host(run_prompt, which, scheduler):
    """Nodes alone: a portrait is encoded, inverted, and drawn again by SamplerCustomAdvanced."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}  # noqa: E731
    done = run_prompt({
        "1": node("SteerLabModel", model=which),
        "2": node("SteerLabPortrait", seed=3, **dict.fromkeys(
            ("style", "expression", "position", "skin", "hair_style", "hair_color", "glasses", "hat", "shirt",
             "pattern", "background"), "from seed")),
        "3": node("CLIPTextEncode", clip=["1", 1], text=["2", 1]),
        "4": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
        "5": node("SteerInvert", model=["1", 0], positive=["3", 0], latent=["4", 0], method="fixed-point", steps=10,
                  scheduler=scheduler, denoise=1.0, iterations=5),
        "6": node("BasicGuider", model=["1", 0], conditioning=["3", 0]),
        "7": node("KSamplerSelect", sampler_name="euler"),
        "8": node("SamplerCustomAdvanced", noise=["5", 2], guider=["6", 0], sampler=["7", 0], sigmas=["5", 3],
                  latent_image=["4", 0]),
    })
    latent, drawn = done["4"][0]["samples"], done["8"][0]["samples"]
    assert decibel(drawn, latent) > 35
    assert done["5"][1].method == "fixed-point" and len(done["5"][1].latents) == len(done["5"][3]) == 11
