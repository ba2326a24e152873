import logging

import comfy.model_base
import comfy.model_sampling
import pytest
import torch
import toy
from comfy_extras.nodes_model_advanced import RescaleCFG
from steer.patches.guidance import apg, pag, rescale
from steer.patches.shared.schedule import Schedule


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, amount=0.7, schedule=Schedule()):
    return rescale.apply(model, amount, schedule)


def oracle(model, amount):
    """Equation 14 to 16 of the paper on the velocity, item by item in float64.

    Diffusion: v = a eps - s D with a = 1 / sqrt(1 + sigma^2), s = sigma a. Flow: the network's own v = eps - D.
    """
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)

    def cfg_function(args):
        out = []
        for x, D_c, D_u, sigma in zip(
            *(args[k].double() for k in ("input", "cond_denoised", "uncond_denoised", "sigma")), strict=True
        ):
            a = 1 / (1 + sigma**2) ** 0.5

            def velocity(D, x=x, sigma=sigma, a=a):
                return (x - D) / sigma if flow else a * (x - D) / sigma - sigma * a * D

            v_c, v_u = velocity(D_c), velocity(D_u)
            v = v_u + args["cond_scale"] * (v_c - v_u)
            v = amount * v * v_c.std() / v.std() + (1 - amount) * v
            D = x - sigma * v if flow else a * (a * x) - sigma * a * v
            out.append(x - D)
        return torch.stack(out).float()

    model = model.clone()
    model.set_model_sampler_cfg_function(cfg_function)
    return model


def near(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.std()))


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_equals_the_papers_formula(kind, amount):
    model, start = toy.model(kind=kind), toy.noise(batch=2)
    ours = toy.sample(steered(model, amount), start=start, steps=6, cfg=9.0)
    assert near(ours, toy.sample(oracle(model, amount), start=start, steps=6, cfg=9.0))
    assert not torch.allclose(ours, toy.sample(model, start=start, steps=6, cfg=9.0), rtol=1e-2)


def test_on_a_flow_transformer():
    model = toy.flux()
    assert near(toy.sample(steered(model)), toy.sample(oracle(model, 0.7)))


@pytest.mark.parametrize("kind, equal", [("eps", True), ("v", True), ("flow", False)])
def test_equals_the_hosts_node_where_that_is_right(kind, equal):
    """The host takes the velocity of diffusion for that of flow models too."""
    model, start = toy.model(kind=kind), toy.noise(batch=2)
    host = RescaleCFG().patch(model, 0.7)[0]
    ours, theirs = (toy.sample(m, start=start, steps=6) for m in (steered(model), host))
    assert near(ours, theirs) == equal


def test_network_output_of_every_kind_is_what_is_rescaled():
    """kx - D, scaled as the network scales it: whatever the network says, D is undone to a multiple of that."""
    x, F, sigma = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()[:2] + (
        torch.ones(2) * 3,
    )
    for kind in ("V_PREDICTION", "EDM", "CONST", "COSMOS_RFLOW", "X0", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM"):
        if not hasattr(comfy.model_sampling, kind):
            continue
        sampling = type("Sampling", (getattr(comfy.model_sampling, kind),), {"sigma_data": 0.5})()
        if kind == "V_PREDICTION_DDPM":
            sampling.sigma_data = 1.0
        D = sampling.calculate_denoised(sigma, F, x)
        rest = x * rescale.share(sampling, 3.0) - D
        factor = (rest * F).sum() / (F * F).sum()
        assert torch.allclose(rest, factor * F, atol=1e-4), kind


def test_an_unknown_kind_of_model_is_refused():
    class Other:
        pass

    with pytest.raises(ValueError, match="not known; use it on eps, v, EDM and flow"):
        rescale.share(type("Sampling", (Other,), {})(), 1.0)


@pytest.mark.parametrize("shape", [(2, 8, 50), (2, 4, 8, 8), (2, 4, 3, 6, 6)], ids=["audio", "image", "video"])
def test_amount_one_gives_each_item_the_positives_std(shape):
    g = torch.Generator().manual_seed(0)
    x, D_c, D = (torch.randn(shape, generator=g) for _ in range(3))
    D[1] *= 9.0
    run = type("Run", (), {"sampling": type("Flow", (comfy.model_sampling.CONST,), {})()})
    call = type("Call", (), {"x": x, "sigma": torch.full((2,), 0.5), "run": run, "predictions": {"positive": D_c}})
    out = rescale.Rescale(phi=1.0).transform(D, call, 1.0)
    for i in range(2):
        assert (x - out)[i].std() == pytest.approx(float((x - D_c)[i].std()), rel=1e-4)


def test_with_apg_and_pag_all_that_is_guided_is_rescaled(model):
    both = pag.apply(apg.apply(model, 0.0, 2.0, 0.0, Schedule()), 2.0, "auto", Schedule())
    seen = {}

    def keep(args):
        seen.update(args)
        return args["denoised"]

    run = steered(both, 1.0)
    run.set_model_sampler_post_cfg_function(keep)
    toy.sample(run, steps=1)
    x, s = seen["input"], float(seen["sigma"][0])
    v, v_c = (x / (s**2 + 1) - seen[k] for k in ("denoised", "cond_denoised"))
    assert float(v.std()) == pytest.approx(float(v_c.std()), rel=1e-4)


def test_it_works_under_another_nodes_formula(model):
    """One slot of the host holds the formula; the correction is not in it, so that none is lost."""
    foreign = steered(model)
    foreign.set_model_sampler_cfg_function(lambda a: a["uncond"] + a["cond_scale"] * (a["cond"] - a["uncond"]))
    assert near(toy.sample(foreign), toy.sample(steered(model)))


def test_pag_alone_is_rescaled_without_cfg(model, caplog):
    alone = pag.apply(model, 3.0, "auto", Schedule())
    with caplog.at_level(logging.WARNING):
        out = toy.sample(steered(alone), cfg=1.0)
    assert "no effect" not in caplog.text
    assert not torch.allclose(out, toy.sample(alone, cfg=1.0), rtol=1e-2)


def test_at_cfg_one_it_changes_nothing_and_says_so(model, caplog):
    with caplog.at_level(logging.WARNING), toy.count_forwards(model) as count:
        out = toy.sample(steered(model), cfg=1.0)
    assert (count.calls, count.rows) == (4, 4) and "SteerRescale has no effect in this run: cfg is 1" in caplog.text
    plain = toy.sample(model, cfg=1.0)
    assert torch.allclose(out, plain, rtol=1e-4, atol=1e-5 * float(plain.std()))


def test_a_curve_scales_the_amount(model):
    ours = toy.sample(steered(model, 0.8, Schedule(curve=(0.5, 0.5))))
    assert near(ours, toy.sample(steered(model, 0.4)))


def test_equal_prompts_and_constant_predictions_are_defined(model):
    ours, plain = (toy.sample(m, negative=toy.POSITIVE) for m in (steered(model), model))
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.std()))
    assert float(rescale.std(torch.ones(1, 2, 2)) / rescale.std(torch.ones(1, 2, 2))) == 1.0


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_numbers_raise(model, amount):
    with pytest.raises(ValueError, match="SteerRescale: amount .* from 0 to 1"):
        steered(model, amount)
