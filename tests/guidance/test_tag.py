import logging

import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Guider_Basic
from steer.patches.guidance import cfgpp, tag
from steer.patches.shared.schedule import Schedule

STEPS = 6


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, scale=0.15, schedule=Schedule()):
    return tag.apply(model, scale, schedule)


def paper(eta, kind, step=None):
    """Algorithm 1 as a sampler, in the paper's scaling, item by item: the base solver's step, split along x.

    eps models run in VP, as Stable Diffusion's DDIM does.  step(model, x, s, s_next) -> the base solver's x'.
    """

    def euler(D, x, s, s_next):
        if kind == "flow":
            return x + (s_next - s) * (x - D) / s
        a, a_next = 1 / (1 + s**2), 1 / (1 + s_next**2)
        eps = (x - a.sqrt() * D) / (1 - a).sqrt()
        return a_next.sqrt() * D + (1 - a_next).sqrt() * eps

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        x = x.double() if kind == "flow" else x.double() / (1 + sigmas[0] ** 2).sqrt()
        for s, s_next in zip(sigmas.double(), sigmas[1:].double(), strict=False):
            seen_by_host = x if kind == "flow" else x * (1 + s**2).sqrt()
            D = model(seen_by_host.float(), s.float() * x.new_ones(len(x), dtype=torch.float32), **extra_args).double()
            for i in range(len(x)):
                delta = euler(D[i], x[i], s, s_next) - x[i]
                unit = x[i] / x[i].norm()
                radial = (delta * unit).sum() * unit
                x[i] = x[i] + radial + eta * (delta - radial)
        return x.float()

    return comfy.samplers.KSAMPLER(sample)


def near(a, b):
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.std()))


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("eta", [1.15, 1.6])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_is_the_papers_step(kind, eta, sampler):
    """Though the paper works in VP, the host in VE: these differ along x only."""
    model, start = toy.model(kind=kind), toy.noise(batch=2)
    ours = toy.sample(steered(model, eta - 1), sampler=sampler, steps=STEPS, start=start)
    assert near(ours, toy.sample(model, sampler=paper(eta, kind), steps=STEPS, start=start))
    assert not near(ours, toy.sample(model, sampler=sampler, steps=STEPS, start=start))


def test_on_a_flow_transformer():
    model = toy.flux()
    assert near(toy.sample(steered(model)), toy.sample(model, sampler=paper(1.15, "flow")))


@pytest.mark.parametrize("shape", [(2, 8, 50), (2, 4, 8, 8), (2, 4, 3, 6, 6)], ids=["audio", "image", "video"])
def test_radial_part_stays_tangential_part_grows(shape):
    g = torch.Generator().manual_seed(0)
    x, D = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    call = type("Call", (), {"x": x, "run": type("Run", (), {"renoise": None})})
    out = tag.TAG(gain=0.5).step(D, call, 1.0)
    for i in range(2):
        unit = x[i] / x[i].norm()
        before, after = (v - (v * unit).sum() * unit for v in (D[i] - x[i], out[i] - x[i]))
        assert torch.allclose(after, 1.5 * before, atol=1e-4)
        assert ((out[i] * unit).sum() - (D[i] * unit).sum()).abs() < 1e-3


def test_with_cfgpp_it_splits_the_step_of_cfgpp():
    """euler on KSampler, the CFG++ sampler and the paper's two algorithms one after the other agree."""
    eta, lam, kind = 1.3, 0.6, "flow"
    model = toy.model(kind=kind)
    both = steered(cfgpp.apply(model, lam, Schedule()), eta - 1)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        seen = {}

        def keep(args):
            seen.update(c=args["cond_denoised"], u=args["uncond_denoised"])
            return args["denoised"]

        options = comfy.model_patcher.set_model_options_post_cfg_function(extra_args["model_options"], keep, True)
        for s, s_next in zip(sigmas, sigmas[1:], strict=False):
            model(x, s * x.new_ones(len(x)), **{**extra_args, "model_options": options})
            D_l = seen["u"] + lam * (seen["c"] - seen["u"])
            noise = (x - (1 - s) * seen["u"]) / s
            delta = (1 - s_next) * D_l + s_next * noise - x
            radial = (delta * x).sum() / (x * x).sum() * x
            x = x + radial + eta * (delta - radial)
        return x

    expected = toy.sample(model, sampler=comfy.samplers.KSAMPLER(sample), steps=STEPS)
    assert near(toy.sample(both, steps=STEPS), expected)
    assert near(toy.sample(both, sampler=cfgpp.sampler("euler", 1.0, 1.0), steps=STEPS), expected)
    assert torch.equal(
        toy.sample(cfgpp.apply(steered(model, eta - 1), lam, Schedule()), steps=STEPS), toy.sample(both, steps=STEPS)
    )


def test_acts_without_cfg_and_says_nothing(model, caplog):
    with caplog.at_level(logging.WARNING), toy.count_forwards(model) as count:
        out = toy.sample(steered(model), cfg=1.0, steps=STEPS)
    assert (count.calls, count.rows) == (STEPS, STEPS) and "no effect" not in caplog.text
    assert near(out, toy.sample(model, cfg=1.0, sampler=paper(1.15, "eps"), steps=STEPS))
    guider = Guider_Basic(steered(model))
    guider.set_conds(toy.POSITIVE)
    assert torch.equal(toy.sample(model, guider=guider, steps=STEPS), out)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "uni_pc", "lcm", "euler_cfg_pp"])
def test_other_samplers_get_every_estimate_amplified(model, sampler):
    """No claim of the paper's step there: each D has its part across x lengthened, and nothing else changes."""
    across = model.clone()

    def amplify(args):
        x, D = args["input"], args["denoised"]
        return D + 0.15 * (D - (D * x).sum() / (x * x).sum() * x)

    across.set_model_sampler_post_cfg_function(amplify)
    ours, theirs = (toy.sample(m, sampler=sampler, steps=STEPS) for m in (steered(model), across))
    assert near(ours, theirs)


def test_a_curve_scales_it(model):
    quarter = toy.sample(steered(model, 0.4, Schedule(curve=(0.25, 0.25))))
    assert near(quarter, toy.sample(steered(model, 0.1)))


def test_equal_prompts_and_zero_latents_are_defined(model):
    assert toy.sample(steered(model), negative=toy.POSITIVE).isfinite().all()
    zero = torch.zeros(1, 4, 2, 2)
    call = type("Call", (), {"x": zero, "run": type("Run", (), {"renoise": None})})
    assert torch.equal(tag.TAG(gain=0.5).step(zero + 1, call, 1.0), zero + 1.5)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_bad_numbers_raise(model, scale):
    with pytest.raises(ValueError, match="SteerTAG: scale .* must be a finite number from 0"):
        steered(model, scale)
