import pytest
import torch
import toy
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from steer.patches.guidance import apg, cfgpp, cfgzerostar, tcfg
from steer.patches.shared.schedule import Schedule


@pytest.fixture(scope="module")
def model():
    return toy.model(kind="flow")


def steered(model, zero_init=0.0, schedule=Schedule()):
    return cfgzerostar.apply(model, zero_init, schedule)


def oracle(model, zeroed=0):
    """Algorithm 1 in its own space, item by item in float64: v for flow, sigma v here; v = 0 in the first steps."""
    seen = []

    def cfg_function(args):
        sigma = float(args["sigma"][0])
        if sigma not in seen:
            seen.append(sigma)
        if seen.index(sigma) < zeroed:
            return torch.zeros_like(args["cond"])
        out = []
        for v_c, v_u in zip(args["cond"].double(), args["uncond"].double(), strict=True):
            s = (v_c * v_u).sum() / (v_u**2).sum()
            out.append(s * v_u + args["cond_scale"] * (v_c - s * v_u))
        return torch.stack(out).float()

    model = model.clone()
    model.set_model_sampler_cfg_function(cfg_function)
    return model


def near(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.std()))


@pytest.mark.parametrize("kind", ["flow", "v", "eps"])
def test_optimised_scale_is_the_papers(kind):
    model, start = toy.model(kind=kind), toy.noise(batch=2)
    ours = toy.sample(steered(model), start=start, steps=6)
    assert near(ours, toy.sample(oracle(model), start=start, steps=6))
    assert not torch.allclose(ours, toy.sample(model, start=start, steps=6), rtol=1e-2)


def test_on_a_flow_transformer():
    model = toy.flux()
    assert near(toy.sample(steered(model, 0.04)), toy.sample(oracle(model, 1)))


def test_the_hosts_node_applies_the_scale_of_velocities_to_clean_estimates(model):
    """What it lacks is (1 - w)(1 - s) x; with x added it is ours."""
    ours, hosts = [], []
    w, start = 5.0, toy.noise()

    def keep(args):
        x, D_c, D_u = args["input"], args["cond_denoised"], args["uncond_denoised"]
        s = tcfg.dot(x - D_c, x - D_u) / tcfg.dot(x - D_u, x - D_u)
        hosts[-1] = hosts[-1] + (1 - w) * (1 - s) * x
        return args["denoised"]

    node = CFGZeroStar.execute(model).result[0]
    node.set_model_sampler_post_cfg_function(lambda args: (hosts.append(args["denoised"]), keep(args))[1])
    toy.sample(node, cfg=w, steps=1, start=start)
    own = steered(model)
    own.set_model_sampler_post_cfg_function(lambda args: (ours.append(args["denoised"]), args["denoised"])[1])
    toy.sample(own, cfg=w, steps=1, start=start)
    assert near(ours[0], hosts[0])


@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize("steps, zero_init, zeroed", [(4, 0.04, 1), (20, 0.04, 1), (25, 0.08, 2), (10, 0.3, 3)])
def test_zero_init_stands_still_and_asks_nothing(kind, steps, zero_init, zeroed):
    model, seen = toy.model(kind=kind), []
    with toy.count_forwards(model) as count:
        out = toy.sample(
            steered(model, zero_init), steps=steps, callback=lambda i, x0, x, n: seen.append((x0.clone(), x.clone()))
        )
    assert count.calls == steps - zeroed and count.rows == 2 * count.calls
    for x0, x in seen[:zeroed]:
        assert torch.equal(x0, x) and torch.allclose(x, seen[0][1])
    assert near(out, toy.sample(oracle(model, zeroed), steps=steps))


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "uni_pc", "dpmpp_2m", "res_multistep"])
def test_with_other_samplers_it_is_zero_above_one_noise_level(sampler):
    """Samplers that evaluate a level twice or go in between see one field, and the second level is never zero."""
    model, levels = toy.model(), []

    def zero_above(args):
        levels.append(float(args["sigma"][0]))
        return torch.zeros_like(args["cond"]) if levels[-1] > end else plain(args)

    sigmas = toy.sigmas(model, 6)
    end = float(sigmas[2])
    plain = oracle(model).model_options["sampler_cfg_function"]
    theirs = model.clone()
    theirs.set_model_sampler_cfg_function(zero_above)
    expected = toy.sample(theirs, sampler=sampler, sigmas=sigmas)
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, 2 / 6), sampler=sampler, sigmas=sigmas)
    assert near(out, expected)
    assert count.calls == sum(level <= end for level in levels)


def test_every_run_starts_anew(model):
    steady = steered(model, 0.3)
    first = toy.sample(steady, steps=10)
    with toy.count_forwards(model) as count:
        assert torch.equal(toy.sample(steady, steps=10), first)
    assert count.calls == 7


def test_outside_its_window_nothing_stands_still(model):
    with toy.count_forwards(model) as count:
        toy.sample(steered(model, 0.04, Schedule(0.6, 1.0)), steps=10)
    assert count.calls == 10


def test_zero_init_also_without_guidance(model):
    with toy.count_forwards(model) as count:
        toy.sample(steered(model, 0.04), cfg=1.0, steps=5)
    assert (count.calls, count.rows) == (4, 4)


def test_cfgpp_stands_still_too():
    """x' of CFG++ with D = D_u = x is x, by euler and by its own sampler."""
    for kind in ("eps", "flow"):
        both = steered(cfgpp.apply(toy.model(kind=kind), 0.6, Schedule()), 0.3)
        seen = []
        ours = toy.sample(both, steps=6, callback=lambda i, x0, x, n, s=seen: s.append(x.clone()))
        assert torch.allclose(seen[0], seen[2])
        assert near(ours, toy.sample(both, steps=6, sampler=cfgpp.sampler("euler", 1.0, 1.0)))


@pytest.mark.parametrize("shape", [(2, 8, 50), (2, 4, 8, 8), (2, 4, 3, 6, 6)], ids=["audio", "image", "video"])
def test_scale_is_per_item_over_everything_else(shape):
    g = torch.Generator().manual_seed(0)
    x, D_c, D_u = (torch.randn(shape, generator=g) for _ in range(3))
    d = cfgzerostar.CFGZeroStar().reshape(D_c - D_u, D_c, type("Call", (), {"x": x}), 1.0)
    for i in range(2):
        v_c, v_u = x[i] - D_c[i], x[i] - D_u[i]
        s = (v_c * v_u).sum() / v_u.square().sum()
        assert torch.allclose(D_c[i] - d[i], x[i] - s * v_u, atol=1e-5)


def test_equal_prompts_and_zero_predictions_are_defined(model):
    ours, plain = (toy.sample(m, negative=toy.POSITIVE) for m in (steered(model), model))
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.std()))
    x = torch.ones(1, 4, 2, 2)
    call = type("Call", (), {"x": x})
    assert cfgzerostar.CFGZeroStar().reshape(torch.zeros_like(x), x, call, 1.0).isfinite().all()


def test_it_comes_before_tcfg_and_apg(model):
    args = 0.0, 2.0, -0.5, Schedule()
    ours = toy.sample(apg.apply(tcfg.apply(steered(model), 1.0, Schedule()), *args))
    before = model.clone()

    def scaled(args):
        x, (D_c, D_u) = args["input"], args["conds_out"]
        s = tcfg.dot(x - D_c, x - D_u) / tcfg.dot(x - D_u, x - D_u)
        return [D_c, x - s * (x - D_u)]

    before.set_model_sampler_pre_cfg_function(scaled)
    assert near(ours, toy.sample(apg.apply(tcfg.apply(before, 1.0, Schedule()), *args)))


def test_guiders_with_arithmetic_of_their_own_are_refused(model):
    """Peers fail there in mid-run, or are ignored without a word."""
    guider = Guider_PerpNeg(steered(model))
    guider.set_conds(toy.POSITIVE, toy.NEGATIVE, toy.NEGATIVE)
    guider.set_cfg(5.0, 1.0)
    with pytest.raises(ValueError, match="SteerCFGZeroStar: acts on positive - negative, which Guider_PerpNeg"):
        toy.sample(model, guider=guider)


@pytest.mark.parametrize("zero_init", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_numbers_raise(model, zero_init):
    with pytest.raises(ValueError, match="SteerCFGZeroStar: zero_init .* from 0 to 1"):
        steered(model, zero_init)
