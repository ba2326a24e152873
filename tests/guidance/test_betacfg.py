import math

import pytest
import torch
import toy
from comfy_extras.nodes_model_advanced import RescaleCFG
from steer.patches.guidance import apg, betacfg, fdg
from steer.patches.shared.schedule import Schedule

STEPS = 6


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, a=2.0, b=2.0, gamma=1.0, keep=False, schedule=Schedule()):
    return betacfg.apply(model, a, b, gamma, keep, schedule)


def oracle(model, a, b, gamma, steps, keep=False):
    """The paper's formula on eps (the velocity on flow), step by step and item by item in float64."""
    density = torch.distributions.Beta(torch.tensor(a).double(), torch.tensor(b).double())
    seen = []

    def cfg_function(args):
        sigma, w = args["sigma"].double(), args["cond_scale"]
        seen.append(float(sigma[0]))
        t = torch.tensor((len(seen) - 1) % steps / (steps - 1)).double()
        pdf = density.log_prob(t.clamp(1e-12, 1 - 1e-12)).exp()
        out = []
        for eps_c, eps_u, s in zip(args["cond"].double(), args["uncond"].double(), sigma, strict=True):
            eps_c, eps_u = eps_c / s, eps_u / s
            size = (eps_c - eps_u).square().mean().sqrt() * 128  # the norm on a latent of the paper's size
            if keep:
                eps = eps_c + (w - 1) * pdf * (eps_c - eps_u) / size**gamma
            else:
                eps = eps_u + w * pdf * (eps_c - eps_u) / size**gamma
            out.append(s * eps)
        return torch.stack(out).float()

    model = model.clone()
    model.set_model_sampler_cfg_function(cfg_function)
    return model


def near(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.std()))


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("a, b, gamma, keep", [(2.0, 2.0, 1.0, False), (2.0, 3.0, 0.0, False), (1.5, 4.0, 0.5, True)])
def test_equals_the_papers_formula(kind, a, b, gamma, keep):
    model, start = toy.model(kind=kind), toy.noise(batch=2)
    ours = toy.sample(steered(model, a, b, gamma, keep), start=start, steps=STEPS, cfg=40.0)
    theirs = toy.sample(oracle(model, a, b, gamma, STEPS, keep), start=start, steps=STEPS, cfg=40.0)
    assert near(ours, theirs)
    assert not torch.allclose(ours, toy.sample(model, start=start, steps=STEPS, cfg=40.0), rtol=1e-2)


def test_on_a_flow_transformer():
    model = toy.flux()
    assert near(toy.sample(steered(model), steps=STEPS), toy.sample(oracle(model, 2.0, 2.0, 1.0, STEPS), steps=STEPS))


def test_uniform_and_not_normalised_is_cfg(model):
    for keep in (False, True):
        ours, cfg = toy.sample(steered(model, 1.0, 1.0, 0.0, keep), cfg=7.0), toy.sample(model, cfg=7.0)
        assert torch.allclose(ours, cfg, rtol=1e-4, atol=1e-5 * float(cfg.std()))


@pytest.mark.parametrize("keep, alone", [(False, toy.NEGATIVE), (True, toy.POSITIVE)], ids=["paper", "keep"])
def test_first_and_last_step_are_not_guided(model, keep, alone):
    """With two steps all are: the picture is that of the negative alone, or of the positive."""
    ours = toy.sample(steered(model, keep=keep), steps=2, cfg=9.0)
    assert near(ours, toy.sample(model, steps=2, cfg=1.0, positive=alone))
    one = toy.sample(steered(model, keep=keep), steps=1, cfg=9.0)
    assert near(one, toy.sample(model, steps=1, cfg=1.0, positive=alone))


def guided(D_c, D_u, sigma, w=7.5, step=3, steps=7, **settings):
    """The scale that one evaluation gives, [B, 1, ...]."""
    sigmas = torch.linspace(14.0, 0.0, steps + 1)
    sigmas[step] = sigma
    call = type("Call", (), {"sigma": sigmas[step].expand(len(D_c)), "sigmas": sigmas})
    return betacfg.BetaCFG(**settings).scale(w, D_c - D_u, call, 1.0)


@pytest.mark.parametrize("shape", [(2, 8, 50), (2, 4, 8, 8), (2, 4, 3, 6, 6)], ids=["audio", "image", "video"])
def test_size_of_the_guidance_does_not_depend_on_the_prediction(shape):
    """With gamma 1 the difference of eps has the root mean square w B(t) / 128, item by item, whatever it was."""
    g = torch.Generator().manual_seed(0)
    d, factors = torch.randn(shape, generator=g), torch.tensor([1.0, 50.0]).view(-1, *[1] * (len(shape) - 1))
    for sigma in (8.0, 0.3):
        eps = guided(d * factors, torch.zeros(shape), sigma) * d * factors / sigma
        assert torch.allclose(eps.flatten(1).square().mean(1).sqrt(), torch.tensor(7.5 * 1.5 / 128), rtol=1e-4)


def test_on_the_papers_latent_the_norm_is_the_papers():
    d = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert float(guided(d, torch.zeros_like(d), 2.0)) == pytest.approx(7.5 * 1.5 / float(d.norm() / 2.0), rel=1e-4)


def test_progress_is_by_step_and_its_peak_in_the_middle(model):
    """Beta(2, 5) peaks at 0.2; samplers that evaluate in between take the nearest step."""
    sigmas = toy.sigmas(model, 11)
    term = betacfg.BetaCFG(a=2.0, b=5.0)
    call = type("Call", (), {"sigmas": sigmas})
    density = []
    for sigma in sigmas[:-1]:
        call.sigma = sigma.view(1)
        density.append(float(term._density(call)))
    assert density == pytest.approx([30 * (k / 10) * (1 - k / 10) ** 4 for k in range(11)])
    assert density.index(max(density)) == 2
    call.sigma = (0.9 * sigmas[4] + 0.1 * sigmas[5]).view(1)
    assert float(term._density(call)) == pytest.approx(density[4])


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "uni_pc", "euler_ancestral"])
def test_with_other_samplers(model, sampler):
    assert toy.sample(steered(model), sampler=sampler, steps=STEPS).isfinite().all()


def test_equal_prompts_are_defined(model):
    for gamma in (1.0, 4.0):
        ours = toy.sample(steered(model, gamma=gamma), negative=toy.POSITIVE)
        assert near(ours, toy.sample(model, negative=toy.POSITIVE))
    d = torch.zeros(1, 4, 2, 2)
    assert not (guided(d, d, 1.0, gamma=4.0) * d).isnan().any()


def test_a_curve_blends_with_cfg(model):
    """Three steps, of which the schedule leaves the middle one: D is linear in the weight there."""
    window = dict(steps=3, cfg=30.0)
    sigmas = toy.sigmas(model, 3)
    half = steered(model, a=1.0, b=1.0, schedule=Schedule(curve=(0.5, 0.5)))
    full = steered(model, a=1.0, b=1.0)
    one = dict(steps=1, cfg=30.0, sigmas=sigmas[:2].clone())
    blend = toy.sample(model, **one).lerp(toy.sample(full, **one), 0.5)
    assert torch.allclose(toy.sample(half, **one), blend, rtol=1e-4, atol=1e-4 * float(blend.std()))
    assert not torch.equal(toy.sample(half, **window), toy.sample(full, **window))


def test_no_forward_of_its_own_and_nothing_at_cfg_one(model):
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model), cfg=1.0)
    assert (count.calls, count.rows) == (4, 4)
    assert torch.equal(out, toy.sample(model, cfg=1.0))


def test_with_apg_it_weighs_the_reshaped_difference(model):
    both = apg.apply(steered(model), 0.0, 2.0, 0.0, Schedule())
    assert toy.sample(both).isfinite().all() and not torch.equal(toy.sample(both), toy.sample(steered(model)))


def test_another_nodes_formula_gets_the_weight(model):
    """RescaleCFG and the like take cfg as a number or one per item."""
    foreign = steered(model)
    foreign.set_model_sampler_cfg_function(lambda a: a["uncond"] + a["cond_scale"] * (a["cond"] - a["uncond"]))
    start = toy.noise(batch=2)
    assert near(toy.sample(foreign, start=start), toy.sample(steered(model), start=start))
    assert toy.sample(RescaleCFG().patch(steered(model), 0.7)[0], start=start).isfinite().all()


def test_beside_another_weight_it_is_refused(model):
    with pytest.raises(ValueError, match="sets the guidance weight, and so does SteerBetaCFG"):
        toy.sample(fdg.apply(steered(model), 5.0, 10.0, 1, Schedule()))


@pytest.mark.parametrize("name", ["a", "b", "gamma"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_numbers_raise(model, name, value):
    with pytest.raises(ValueError, match=f"SteerBetaCFG: {name} .* must be a finite number from"):
        steered(model, **{name: value})
