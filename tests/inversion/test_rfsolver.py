import pytest
import torch
import toy
from steer.patches.inversion import directinversion, invert, rfsolver
from steer.patches.shared.schedule import Schedule

STEPS = 5


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.std()) < tolerance


def taylor(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Algorithm 1 of the paper: a second-order Taylor step, the derivative of v by a difference over half of it."""
    def v(x, t):
        return (x - model(x, t * x.new_ones(len(x)), **extra_args)) / t

    for t, t_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        h = t_next - t
        first = v(x, t)
        derivative = (v(x + h / 2 * first, t + h / 2) - first) / (h / 2)
        x = x + h * first + h**2 / 2 * derivative
    return x


@pytest.mark.parametrize("made", [toy.flux, lambda: toy.model(kind="flow"), toy.model], ids=["flux", "flow", "eps"])
@pytest.mark.parametrize("batch", [1, 2])
def test_is_the_papers_step(made, batch):
    import comfy.samplers

    model, start = made(), toy.noise(0, batch, 15, 18)
    with toy.count_forwards(model) as count:
        out = toy.sample(model, sampler=rfsolver.sampler(), steps=STEPS, start=start)
    assert count.calls == 2 * STEPS
    assert near(out, toy.sample(model, sampler=comfy.samplers.KSAMPLER(taylor), steps=STEPS, start=start))


def test_its_error_falls_with_the_square_of_the_steps():
    """On Gaussian data x(s) is known."""
    model, start, std = toy.gaussian(), toy.noise(), 0.5
    mean = 4 * toy.POSITIVE[0][0].mean().tanh()

    def error(sampler, steps):
        sigmas = torch.linspace(2.0, 0.5, steps + 1)
        x = start * (1 + sigmas[0] ** 2).sqrt() if sigmas[0] > 10 else start * sigmas[0]
        truth = mean + (x - mean) * ((std**2 + sigmas[-1] ** 2) / (std**2 + sigmas[0] ** 2)).sqrt()
        out = toy.sample(model, 1.0, sampler, start=start, sigmas=sigmas)
        return float((out - model.model.process_latent_out(truth)).abs().max())

    assert error(rfsolver.sampler(), 10) < 0.2 * error("euler", 10)
    assert error(rfsolver.sampler(), 20) < 0.3 * error(rfsolver.sampler(), 10)  # order 2: a quarter


def test_it_retraces_the_inversion_of_its_name():
    """Nearer to the picture than euler after an Euler inversion in as many steps."""
    model, latent = toy.gaussian(), 0.5 * toy.noise(30)
    ends = {}
    for method, sampler in (("rf-solver", rfsolver.sampler()), ("ddim / euler", "euler")):
        with torch.inference_mode():
            found = invert.invert(model, toy.POSITIVE, latent, toy.sigmas(model, 20), method)
        start = invert.InvertedNoise(found, model).generate_noise({"samples": latent})
        ends[method] = toy.sample(model, 1.0, sampler, start=start, latent=latent, sigmas=found.sigmas)
    errors = {method: float((end - latent).norm() / latent.norm()) for method, end in ends.items()}
    assert errors["rf-solver"] < 0.5 * errors["ddim / euler"]


def test_previews_and_mask():
    model, latent, seen = toy.flux(), toy.noise(30), []
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    out = toy.sample(
        model, sampler=rfsolver.sampler(), steps=STEPS, latent=latent, denoise_mask=mask,
        callback=lambda step, x0, x, total: seen.append((step, total, x0)),
    )
    assert [each[:2] for each in seen] == [(i, STEPS) for i in range(STEPS)]
    assert near(out[..., 8:], latent[..., 8:], 1e-5) and not near(out[..., :8], latent[..., :8], 0.1)


def test_what_is_exact_for_euler_refuses_it():
    model, latent = toy.flux(), toy.noise(30)
    with torch.inference_mode():
        found = invert.invert(model, toy.POSITIVE, latent, toy.sigmas(model, 3), "ddim / euler")
    steered = directinversion.apply(model, found, 1.0, Schedule())
    with pytest.raises(ValueError, match="SteerDirectInversion: the sampler .* does not take the step"):
        toy.sample(steered, sampler=rfsolver.sampler(), latent=latent, sigmas=found.sigmas)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    import comfy.model_base

    model = toy.model(toy.FLUX, "flow", dtype, base=comfy.model_base.Flux)
    assert toy.sample(model, sampler=rfsolver.sampler(), steps=2).isfinite().all()
