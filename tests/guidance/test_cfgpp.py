import comfy.model_patcher
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Guider_Basic
from steer.patches.guidance import cfgpp
from steer.patches.shared.schedule import Schedule

STEPS = 6


def steered(model, lam=0.6, schedule=Schedule()):
    return cfgpp.apply(model, lam, schedule)


def paper(lam, kind):
    """Algorithm 2 of the paper as a sampler, in its own variables: z = x / sqrt(1 + s^2) on eps and v models."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        seen = {}

        def keep(args):
            seen.update(c=args["cond_denoised"], u=args["uncond_denoised"])
            return args["denoised"]

        options = comfy.model_patcher.set_model_options_post_cfg_function(extra_args["model_options"], keep, True)
        for s, s_next in zip(sigmas, sigmas[1:], strict=False):
            model(x, s * x.new_ones(len(x)), **{**extra_args, "model_options": options})
            z0 = seen["u"] + lam * (seen["c"] - seen["u"])
            if kind == "flow":
                velocity = (x - seen["u"]) / s
                noise = x + (1 - s) * velocity
                x = (1 - s_next) * z0 + s_next * noise
            else:
                abar, abar_next = 1 / (1 + s**2), 1 / (1 + s_next**2)
                z = x * abar.sqrt()
                eps = (z - abar.sqrt() * seen["u"]) / (1 - abar).sqrt()
                z = abar_next.sqrt() * z0 + (1 - abar_next).sqrt() * eps
                x = z / abar_next.sqrt()
        return x

    return comfy.samplers.KSAMPLER(sample)


def near(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=2e-5 * float(b.std()))


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("lam", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "own"])
def test_is_the_papers_step(kind, lam, sampler):
    model = toy.model(kind=kind)
    expected = toy.sample(model, sampler=paper(lam, kind), steps=STEPS)
    sampler = cfgpp.sampler("euler", 1.0, 1.0) if sampler == "own" else sampler
    assert near(toy.sample(steered(model, lam), sampler=sampler, steps=STEPS), expected)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_equals_the_hosts_euler(kind):
    """The host hides lambda in the cfg widget of a sampler."""
    model = toy.model(kind=kind)
    assert near(toy.sample(steered(model, 0.6)), toy.sample(model, cfg=0.6, sampler="euler_cfg_pp"))


def test_on_a_flow_transformer():
    model = toy.flux()
    assert near(toy.sample(steered(model)), toy.sample(model, sampler=paper(0.6, "flow")))


@pytest.mark.parametrize("cfg", [1.0, 3.0, 12.0])
def test_the_samplers_cfg_is_not_used(cfg):
    model = toy.model()
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model), cfg=cfg)
    assert torch.equal(out, toy.sample(steered(model), cfg=5.0))
    assert (count.calls, count.rows) == (4, 8)


def test_the_samplers_cfg_is_used_outside_the_window():
    model = toy.model()
    late = steered(model, schedule=Schedule(0.5, 1.0))
    assert not torch.equal(toy.sample(late, cfg=2.0), toy.sample(late, cfg=9.0))


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize(
    "solver, host", [("euler", "euler"), ("euler_ancestral", "euler_ancestral"), ("dpmpp_2m", "dpmpp_2m_sde eta 0")]
)
def test_solvers_are_the_hosts_when_the_prompts_agree(kind, solver, host):
    """With D_c = D_u nothing is guided, and CFG++ is the solver it is made from."""
    model = toy.model(kind=kind)
    if host == "dpmpp_2m_sde eta 0":  # DPM-Solver++(2M), and right on flow models, where dpmpp_2m is not
        plain = comfy.samplers.ksampler("dpmpp_2m_sde", {"eta": 0.0})
    else:
        plain = host
    schedule = toy.sigmas(model, STEPS)
    if kind == "flow":  # the host's SDE samplers move a first sigma of 1, where the SNR is 0
        schedule[0] = 0.99
    same = dict(negative=toy.POSITIVE, sigmas=schedule)
    ours = toy.sample(steered(model), sampler=cfgpp.sampler(solver, 1.0, 1.0), **same)
    theirs = toy.sample(model, sampler=plain, **same)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-4 * float(theirs.std()))


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_ancestral_without_fresh_noise_is_euler(kind):
    model = steered(toy.model(kind=kind))
    ours = toy.sample(model, sampler=cfgpp.sampler("euler_ancestral", 0.0, 1.0))
    assert near(ours, toy.sample(model, sampler="euler"))


def test_second_order_comes_closer_to_the_truth():
    """On Gaussian data, guided by nothing, x(s) is known: 2M errs less than Euler, and falls faster with the steps."""
    model = steered(toy.gaussian())
    start, mean, std = toy.noise(), 4 * toy.POSITIVE[0][0].mean().tanh(), 0.5

    def error(solver, steps):
        sigmas = toy.sigmas(model, steps, "karras")
        sampler = cfgpp.sampler(solver, 1.0, 1.0)
        out = toy.sample(model, sampler=sampler, sigmas=sigmas, start=start, negative=toy.POSITIVE)
        x = start * (1 + sigmas[0] ** 2).sqrt()
        truth = mean + (x - mean) * std / (std**2 + sigmas[0] ** 2).sqrt()
        return float((out - model.model.process_latent_out(truth)).abs().max())

    assert error("dpmpp_2m", 20) < 0.5 * error("euler", 20)
    assert error("dpmpp_2m", 40) < 0.35 * error("dpmpp_2m", 20)  # order 2: a quarter
    assert error("euler", 40) > 0.4 * error("euler", 20)  # order 1: a half


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0)])
def test_a_window_is_the_same_on_its_own_sampler(window):
    """Where the window closes, the noise of the last unguided prediction inside must not be kept."""
    model = steered(toy.model(), schedule=Schedule(*window))
    ours = toy.sample(model, sampler=cfgpp.sampler("euler", 1.0, 1.0), steps=STEPS)
    host = toy.sample(model, sampler="euler", steps=STEPS)
    assert torch.allclose(ours, host, rtol=1e-3, atol=2e-4 * float(host.std()))


def test_outside_the_window_the_sampler_is_plain():
    model = toy.model()
    late = steered(model, schedule=Schedule(0.0101, 0.0102))  # no step falls into it
    ours, plain = toy.sample(late, sampler=cfgpp.sampler("euler", 1.0, 1.0)), toy.sample(model)
    assert torch.allclose(ours, plain, rtol=1e-3, atol=2e-4 * float(plain.std()))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "lcm", "uni_pc", "euler_cfg_pp"])
def test_other_samplers_raise_with_advice(sampler):
    model = toy.model()
    with toy.count_forwards(model) as count:
        with pytest.raises(ValueError, match="SteerCFGPP: the sampler .* use euler or ddim, or SteerCFGPPSampler"):
            toy.sample(steered(model), sampler=sampler)
    assert count.calls == 0


def test_euler_with_churn_raises():
    churn = comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    with pytest.raises(ValueError, match="SteerCFGPP: the sampler euler with s_churn"):
        toy.sample(steered(toy.model()), sampler=churn)


def test_sigmas_that_do_not_fall_raise():
    with pytest.raises(ValueError, match="SteerCFGPP: the sigmas must fall"):
        toy.sample(steered(toy.model()), sigmas=torch.tensor([14.0, 5.0, 5.0, 0.0]))


def test_without_a_negative_it_raises():
    model = steered(toy.model())
    guider = Guider_Basic(model)
    guider.set_conds(toy.POSITIVE)
    with pytest.raises(ValueError, match="SteerCFGPP: needs a negative conditioning"):
        toy.sample(model, guider=guider)


@pytest.mark.parametrize("lam", [None, 0.0])
def test_its_sampler_without_the_model_node_raises(lam):
    model = toy.model() if lam is None else steered(toy.model(), lam)
    with pytest.raises(ValueError, match="SteerCFGPPSampler: the model carries no SteerCFGPP"):
        toy.sample(model, sampler=cfgpp.sampler("euler", 1.0, 1.0))


def test_preview_gets_a_clean_estimate():
    """The last callback of the own sampler shows the picture that comes out."""
    model, seen = steered(toy.model()), []
    out = toy.sample(
        model, sampler=cfgpp.sampler("dpmpp_2m", 1.0, 1.0), callback=lambda step, x0, x, total: seen.append(x0)
    )
    latent = model.model.process_latent_out(seen[-1])
    assert len(seen) == 4 and torch.equal(latent, out)
