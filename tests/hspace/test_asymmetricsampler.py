import logging

import comfy.samplers
import pytest
import torch
import toy
from steer.patches.hspace import asymmetricsampler, injectfusion
from steer.patches.hspace.asymmetricsampler import calibrated
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import PLAIN
from steer.patches.shared.trajectory import Trajectory, fingerprint

ORIGIN = toy.text(5)


def steered(model, gamma=0.5, schedule=Schedule(), batch=1):
    sigmas = toy.sigmas(model)
    latents = torch.stack([s * toy.noise(50, batch) + 0.3 * toy.noise(40, batch) for s in sigmas])
    content = Trajectory(sigmas, latents, fingerprint(model), ORIGIN)
    return injectfusion.apply(model, content, gamma, schedule)


def ours(calibration=False, omega=0.3, boost=1.0):
    return asymmetricsampler.sampler(calibration, omega, boost)


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def paper(kind, calibration=False, omega=0.3, edited=lambda s: True):
    """The papers' step in their own variables: x_t of unit variance (eps, v) or on the straight path (flow)."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        options = extra_args["model_options"]
        plain = {**options, "transformer_options": {**options["transformer_options"], PLAIN: True}}

        def both(x_t, s, which):
            """P and the noise, of x_t with signal r and noise q."""
            r, q = (1 - s, s) if kind == "flow" else (1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt())
            scale = 1.0 if kind == "flow" else (1 + s**2).sqrt()
            P = model(x_t * scale, s * x.new_ones(len(x)), **{**extra_args, "model_options": which})
            return P, (x_t - r * P) / q, r, q

        x_t = x if kind == "flow" else x / (1 + sigmas[0] ** 2).sqrt()
        for s, s_next in zip(sigmas, sigmas[1:], strict=False):
            P, eps, r, q = both(x_t, s, plain)
            P_mod, eps_mod, _, _ = both(x_t, s, options) if edited(s) else (P, eps, r, q)
            if calibration and edited(s):
                mean = P_mod.mean((1, 2, 3), keepdim=True)
                contrast = P.std((1, 2, 3), keepdim=True) / P_mod.std((1, 2, 3), keepdim=True)
                x_t = x_t + r * (mean + (P_mod - mean) * contrast - P) + omega * q * (eps_mod - eps)
                P_mod, eps, _, _ = both(x_t, s, plain)
            r, q = (1 - s_next, s_next) if kind == "flow" else (1 / (1 + s_next**2).sqrt(),
                                                                s_next / (1 + s_next**2).sqrt())
            x_t = r * P_mod + q * eps
        return x_t

    return comfy.samplers.KSAMPLER(sample)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("options", [{}, dict(calibration=True, omega=0.0), dict(calibration=True, omega=0.7)], ids=str)
def test_is_the_papers_step(kind, options):
    model = toy.model(kind=kind)
    schedule = toy.sigmas(model)
    if kind == "flow":  # at 1 there is no signal to divide by
        schedule[0] = 0.95
    changed = steered(model)
    out = toy.sample(changed, sampler=ours(**options), sigmas=schedule)
    assert near(out, toy.sample(changed, sampler=paper(kind, **options), sigmas=schedule))
    assert not near(out, toy.sample(changed, sigmas=schedule), 1e-3)


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("gamma", [None, 0.0])
def test_without_an_edit_it_is_euler(kind, gamma, caplog):
    model = toy.model(kind=kind)
    same = model if gamma is None else steered(model, gamma)
    with caplog.at_level(logging.WARNING), toy.count_forwards(model) as count:
        out = toy.sample(same, sampler=ours(calibration=True))
    assert torch.equal(out, toy.sample(model)) and count.calls == 4
    assert "SteerAsymmetricSampler: the model carries no node that edits the network" in caplog.text


def test_evaluations():
    """Two of four steps are edited: one evaluation more for each, two with calibration."""
    model = toy.model()
    changed = steered(model, schedule=Schedule(0.0, 0.6))
    last = float(model.get_model_object("model_sampling").percent_to_sigma(0.6))
    for options, calls in (({}, 6), (dict(calibration=True), 8)):
        with toy.count_forwards(model) as count:
            out = toy.sample(changed, sampler=ours(**options))
        assert count.calls == calls
        assert near(out, toy.sample(changed, sampler=paper("eps", edited=lambda s: s > last, **options)))


def test_calibration_keeps_the_mean_of_the_edit_and_the_contrast_of_the_plain():
    D, D_mod = toy.noise(1, 3), 4 + 3 * toy.noise(9, 3)
    out = calibrated(D_mod, D)
    for i in range(3):
        assert abs(float(out[i].std() - D[i].std())) < 1e-5
        assert abs(float(out[i].mean() - D_mod[i].mean())) < 1e-4
    assert torch.allclose(calibrated(D, D), D, atol=1e-6)
    assert bool(calibrated(torch.ones_like(D), D).isfinite().all())


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_boost_is_the_hosts_ancestral_step(kind):
    model = toy.model(kind=kind)
    schedule = toy.sigmas(model, 6)
    if kind == "flow":
        schedule[0] = 0.99
    same = dict(sigmas=schedule, sampler="euler_ancestral")
    boosted = toy.sample(model, sampler=ours(boost=0.0), sigmas=schedule)
    assert torch.allclose(boosted, toy.sample(model, **same), rtol=1e-3, atol=2e-4)
    late = toy.sample(model, sampler=ours(boost=0.3), sigmas=schedule)
    assert not near(late, toy.sample(model, sigmas=schedule), 1e-3) and not near(late, boosted, 1e-3)
    assert torch.equal(late, toy.sample(model, sampler=ours(boost=0.3), sigmas=schedule))
    assert not torch.equal(late, toy.sample(model, sampler=ours(boost=0.3), sigmas=schedule, seed=8))


@pytest.mark.parametrize("options", [{}, dict(calibration=True)], ids=str)
def test_batch_is_two_runs(options):
    model, start = toy.model(), toy.noise(batch=2)
    both = toy.sample(steered(model, batch=2), sampler=ours(**options), start=start)
    assert near(both[:1], toy.sample(steered(model), sampler=ours(**options), start=start[:1]))


def test_preview_and_masked_latents():
    model, seen = steered(toy.model()), []
    out = toy.sample(model, sampler=ours(), callback=lambda step, x0, x, total: seen.append(x0))
    assert len(seen) == 4 and torch.equal(model.model.process_latent_out(seen[-1]), out)
    mask, picture = torch.zeros(1, 1, 16, 16), toy.noise(3)
    mask[..., 8:] = 1.0
    for calibration in (False, True):
        kept = toy.sample(model, sampler=ours(calibration), latent=picture, denoise_mask=mask)
        assert torch.allclose(kept[..., :8], picture[..., :8], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    model = steered(toy.model(dtype=dtype))
    assert bool(toy.sample(model, sampler=ours(True, 0.0, 0.5), steps=2).isfinite().all())


def test_bad_input():
    with pytest.raises(ValueError, match="SteerAsymmetricSampler: omega 2.0 must be a finite number from 0 to 1"):
        ours(omega=2.0)
    with pytest.raises(ValueError, match="SteerAsymmetricSampler: boost_percent -1 must be"):
        ours(boost=-1)
