"""Energies by the formulas, slopes by differences, and what every energy promises; then the lab."""

from dataclasses import dataclass

import pytest
import torch
import toy
from comfy.patcher_extension import WrappersMP
from measurement.by_hand import SMALL, made, once, scales
from steer.patches.guidance import apg, autoguidance, cfgpp, negative, pag, rescale, tag
from steer.patches.measurement import reward
from steer.patches.shared.energy import FLOOR, push
from steer.patches.shared.euler import signal
from steer.patches.shared.schedule import Schedule

import nodes

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)


@dataclass(frozen=True)
class Near:
    """Likes latents that are near a target, [n, C, H, W] as the host stores them."""

    seed: int = 3
    patchers = ()

    def __call__(self, latents):
        target = toy.noise(90 + self.seed, **SMALL) * 3
        return -((latents - target) ** 2).sum((1, 2, 3)) / 2 - 0.1 * (latents.sin() * target).sum((1, 2, 3))


@pytest.fixture(params=["unet", "flux"])
def model(request):
    return made(request.param)


def steered(model, strength=1.0, gradient="estimate", norm="unit", schedule=ALWAYS, scorer=None, **more):
    return reward.apply(model, scorer or Near(), push(strength, gradient, norm, **more), schedule)


def energy(model, D, scorer=None):
    return -(scorer or Near())(model.model.process_latent_out(D))


def slope_at(model, D):
    D = D.detach().clone().requires_grad_()
    return torch.autograd.grad(energy(model, D).sum(), D)[0]


def test_at_the_estimate_it_is_the_formula(model):
    (s, a), D = scales(model), once(model)
    r2, g = s**2 / (a**2 + s**2), slope_at(model, once(model))
    assert torch.allclose(once(steered(model, 1e-3, norm="none")), D - 1e-3 * r2 * g, atol=1e-5 * float(D.std()))
    unit = g / g.square().mean().sqrt() * r2**0.5 * D.std()
    assert torch.allclose(once(steered(model, 0.3)), D - 0.3 * unit, atol=1e-4 * float(D.std()))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_through_the_network_it_is_the_slope_by_differences(model, cfg):
    (s, a), D, start = scales(model), once(model, cfg=cfg), toy.noise(**SMALL)
    shift = once(steered(model, 1e-3, "network", "none"), cfg=cfg) - D
    slope = -shift / (1e-3 * s**2 / max(a, FLOOR))
    for seed in (1, 2):
        way = toy.noise(40 + seed, **SMALL) + slope / slope.std()
        h = 2e-3
        moved = (once(model, cfg=cfg, start=start + sign * h * way) for sign in (1, -1))
        high, low = (float(energy(model, D.double())) for D in moved)
        assert float((slope * way).sum()) == pytest.approx((high - low) / (2 * h * s), rel=0.03)
    towards = once(steered(model, 0.2, "network"), cfg=cfg) - D
    r = s / (a**2 + s**2) ** 0.5
    assert torch.allclose(towards, shift / shift.square().mean().sqrt() * 0.2 * r * D.std(), atol=1e-3 * float(D.std()))


def test_on_gaussian_data_the_forms_differ_by_its_variance():
    """dD/dx = c^2 / (c^2 + s^2) for data of variance c^2; with c = 1 they would be the same."""
    model, c = made("gaussian"), 0.5
    s, _ = scales(model)
    D = once(model, cfg=1.0)
    at, through = (once(steered(model, 0.01, form, "none"), cfg=1.0) - D for form in ("estimate", "network"))
    assert torch.allclose(through, at * c**2 * (1 + s**2) / (c**2 + s**2), rtol=1e-3, atol=1e-5)


def test_energies_add_whatever_their_order(model):
    D = once(model)
    for form in ("estimate", "network"):
        kinds = [dict(scorer=Near(n), strength=0.1 * n, gradient=form) for n in (1, 2)]
        one, two = (once(steered(model, **kind)) - D for kind in kinds)
        both = steered(steered(model, **kinds[0]), **kinds[1])
        assert torch.allclose(once(both) - D, one + two, atol=1e-5 * float(D.std()))
        assert torch.equal(once(both), once(steered(steered(model, **kinds[1]), **kinds[0])))


def test_recurrence_goes_down_step_by_step(model):
    D, (s, a) = once(model), scales(model)
    factor, by_hand = 1e-3 * s**2 / (a**2 + s**2), once(model)
    for _ in range(3):
        by_hand = by_hand - factor * slope_at(model, by_hand)
    assert torch.allclose(once(steered(model, 1e-3, norm="none", recurrence=3)), by_hand, atol=1e-5 * float(D.std()))


def test_a_mask_leaves_the_rest(model):
    mask, D = torch.zeros(1, 64, 64), once(model)
    mask[:, :, 32:] = 1
    out = once(steered(model, 0.5, mask=mask))
    assert torch.equal(out[..., :4], D[..., :4])
    moved = (out - D)[..., 4:].square().mean().sqrt()
    s, a = scales(model)
    assert float(moved) == pytest.approx(0.5 * s / (a**2 + s**2) ** 0.5 * float(D.std()), rel=1e-3)


def test_every_second_step_and_a_curve(model):
    start = toy.noise(**SMALL)
    levels = toy.sigmas(model, 4)
    alone = [float(s) for s in levels[:4:2]]

    def by_hand(args):  # the same shift at those steps, put in by the host's hook
        D = args["denoised"]
        s = float(args["sigma"][0])
        if min(abs(s - each) for each in alone) > 1e-4 * s:
            return D
        a = float(signal(model.get_model_object("model_sampling"), s))
        with torch.inference_mode(False), torch.enable_grad():
            g = slope_at(model, D.clone())
        return D - 1e-3 * s**2 / (a**2 + s**2) * g

    hooked = model.clone()
    hooked.set_model_sampler_post_cfg_function(by_hand)
    expected = toy.sample(hooked, start=start)
    assert torch.allclose(toy.sample(steered(model, 1e-3, norm="none", every=2), start=start), expected, rtol=1e-3)
    half = once(steered(model, 1.0, schedule=Schedule(curve=(0.5, 0.5))))
    assert torch.allclose(half, once(steered(model, 0.5)), atol=1e-5 * float(half.std()))


@pytest.mark.parametrize("form", ["estimate", "network"])
def test_off_is_no_node_and_open_asks_no_more(model, form):
    start = toy.noise(**SMALL)
    plain = toy.sample(model, steps=2, start=start)
    for off in (dict(strength=0.0), dict(schedule=NEVER), dict(schedule=Schedule(0.0101, 0.0102))):
        assert torch.equal(toy.sample(steered(model, gradient=form, **off), steps=2, start=start), plain)
    assert not steered(model, 0.0).get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, gradient=form), steps=2, start=start)
    assert count.rows == 4 and not torch.equal(out, plain)


@pytest.mark.parametrize("form", ["estimate", "network"])
def test_a_batch_is_its_runs(model, form):
    start = toy.noise(batch=2, **SMALL)
    ours = steered(model, 0.3, form)
    out = toy.sample(ours, start=start, steps=2)
    for i in range(2):
        alone = toy.sample(ours, start=start[i : i + 1], steps=2)
        assert torch.allclose(out[i : i + 1], alone, atol=2e-3 * float(alone.abs().max()))


@pytest.mark.parametrize("form", ["estimate", "network"])
def test_with_what_else_guides(model, form):
    """The graph holds all of it, and ends with the evaluation."""
    together = steered(model, 0.3, form)
    together = negative.apply(pag.apply(together, 2.0, "auto", ALWAYS), toy.text(5), 1.0, ALWAYS)
    together = rescale.apply(apg.apply(together, 0.0, 15.0, -0.5, ALWAYS), 0.5, ALWAYS)
    together = tag.apply(cfgpp.apply(together, 0.6, Schedule(0.5, 1.0)), 0.1, ALWAYS)
    seen = []
    out = toy.sample(together, steps=3, start=toy.noise(**SMALL), callback=lambda i, D, x, n: seen.append(D))
    assert out.isfinite().all() and not any(D.requires_grad for D in seen)


@pytest.mark.parametrize("form", ["estimate", "network"])
def test_a_guider_with_arithmetic_of_its_own(model, form):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    def guided(model):
        guider = Guider_DualCFG(model)
        guider.set_conds(toy.POSITIVE, toy.text(4), toy.NEGATIVE)
        guider.set_cfg(3.0, 2.0)
        return once(model, guider=guider)

    D = guided(model)
    s, a = scales(model)
    moved = guided(steered(model, 0.3, form)) - D
    length = 0.3 * s / (a**2 + s**2) ** 0.5 * float(D.std())
    assert float(moved.square().mean().sqrt()) == pytest.approx(length, rel=1e-3)


def test_a_flow_is_finite_where_it_begins():
    model = made("flux")
    for form in ("estimate", "network"):
        for norm in ("unit", "none"):
            assert once(steered(model, 1e-3, form, norm), level=0.0).isfinite().all()


def test_a_controlnet_beside_it():
    model, hint = made("unet"), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        options = {"control": toy.controlnet(hint), "control_apply_to_uncond": True}
    plain, ours = (once(m, positive=toy.text(1, **options)) for m in (model, steered(model, 0.3, "network")))
    assert ours.isfinite().all() and not torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_slope(dtype):
    """A loss of 1e-6 has slopes that half precision could not hold."""
    whole, half = toy.model(), toy.model(dtype=dtype)

    @dataclass(frozen=True)
    class Faint(Near):
        def __call__(self, latents):
            return super().__call__(latents) * 1e-9

    exact, ours = (
        once(steered(m, 0.5, "network", scorer=Faint()), cfg=1.0) - once(m, cfg=1.0) for m in (whole, half)
    )
    assert float(torch.cosine_similarity(exact.flatten(), ours.float().flatten(), 0)) > 0.95


def test_nothing_else_changes_not_even_after_an_error(model):
    start = toy.noise(**SMALL)
    before, ours = toy.sample(model, steps=2, start=start), steered(model, 0.5, "network")
    asked = [p.requires_grad for p in model.model.parameters()]
    first = toy.sample(ours, steps=2, start=start)

    def stop(step, *_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        toy.sample(ours, steps=2, start=start, callback=stop)
    assert torch.equal(toy.sample(ours, steps=2, start=start), first)
    assert torch.equal(toy.sample(model, steps=2, start=start), before)
    assert asked == [p.requires_grad for p in model.model.parameters()]


def test_bad_input_raises_before_sampling(model):
    with toy.count_forwards(model) as count:
        for options, words in (
            (dict(strength=-1.0), "strength -1.0 must be a finite number from 0"),
            (dict(every=0), "every 0 must be a finite number from 1"),
            (dict(recurrence=0), "recurrence 0 must be"),
            (dict(gradient="both"), "gradient 'both' is unknown; choose one of estimate, network"),
            (dict(norm="two"), "norm 'two' is unknown"),
            (dict(mask=torch.zeros(1, 64, 32)), "the mask is of another aspect"),
            (dict(mask=torch.zeros(3, 64, 64)), "there are 3 masks for a batch of 1"),
        ):
            with pytest.raises(ValueError, match=f"SteerReward: .*{words}"):
                once(steered(model, **options))
        other = autoguidance.apply(model, toy.flux() if model is made("flux") else toy.model(seed=4), 2.0, ALWAYS)
        with pytest.raises(ValueError, match="through the network, and SteerAutoGuidance brings another one"):
            once(steered(other, gradient="network"))
    assert count.calls == 0
    with pytest.raises(ValueError, match="SteerReward: what judges the picture keeps no graph"):
        once(steered(model, scorer=lambda latents: torch.zeros(len(latents))))


def test_quantised_weights_have_an_estimate_and_no_network():
    model = toy.model()
    last = model.model.diffusion_model.out[-1]
    last.weight = type("Packed", (torch.nn.Parameter,), {})(last.weight.data, requires_grad=False)
    assert once(steered(model)).isfinite().all()
    with pytest.raises(ValueError, match="SteerReward: needs gradients, and the weights .* are quantised"):
        steered(model, gradient="network")


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_in_a_node_of_the_host_slopes_are_those_by_differences(run_prompt, monkeypatch, which):
    """Both forms, through the lab's decoder and reader, as the host's executor loads and runs them."""
    found = {}

    class Work:
        RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "work", "test"

        @classmethod
        def INPUT_TYPES(cls):  # noqa: N802
            return {"required": {"plain": ("MODEL",), "estimate": ("MODEL",), "network": ("MODEL",),
                                 "scorer": ("STEER_SCORER",), "positive": ("CONDITIONING",)}}

        def work(self, plain, estimate, network, scorer, positive):
            assert all(p.is_inference() for p in plain.model.diffusion_model.parameters())  # else it would prove little
            given, start = dict(cfg=1.0, positive=positive, negative=positive), toy.noise(**SMALL)
            s, a = scales(plain)
            D = once(plain, **given)

            def loss(D):
                return float(energy(plain, D, scorer).double())

            for form, model in (("estimate", estimate), ("network", network)):
                factor = s**2 / (a**2 + s**2) if form == "estimate" else s**2 / max(a, FLOOR)
                slope = -(once(model, **given) - D) / (1e-3 * factor)
                h, way = 3e-4, slope / slope.square().mean().sqrt()
                ends = ((D + h * way, D - h * way) if form == "estimate" else
                        [once(plain, **{**given, "start": start + sign * h / s * way}) for sign in (1, -1)])
                found[form] = float((slope * way).sum()), (loss(ends[0]) - loss(ends[1])) / (2 * h)
            return ("done",)

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Work", Work)
    numbers = {"strength": 1e-3, "norm": "none", "every": 1, "recurrence": 1, "start_percent": 0.0, "end_percent": 1.0}
    ours = {"model": ["1", 0], "scorer": ["3", 0], **numbers}
    prompt = {
        "1": {"class_type": "SteerLabModel", "inputs": {"model": which}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a comic portrait"}},
        "3": {"class_type": "SteerLabScorer", "inputs": {"vae": ["1", 2], "prompt": "a person, red hair, glasses"}},
        "4": {"class_type": "SteerReward", "inputs": {**ours, "gradient": "estimate"}},
        "5": {"class_type": "SteerReward", "inputs": {**ours, "gradient": "network"}},
        "6": {"class_type": "Work", "inputs": {"plain": ["1", 0], "estimate": ["4", 0], "network": ["5", 0],
                                               "scorer": ["3", 0], "positive": ["2", 0]}},
    }
    run_prompt(prompt)
    for exact, difference in found.values():
        # decoder and reader have kinks everywhere, and the picture is cut to 0..1
        assert exact == pytest.approx(difference, rel=0.15) and abs(exact) > 1.0


def test_on_the_lab_the_score_rises_with_the_strength():
    """The reader's mean log-probability of three factors of which the prompt says nothing."""
    from steer.models.lab.load import load_model
    from steer.models.lab.reader import load_reader
    from steer.nodes.lab.scorer import LabScorer
    from steer.patches.shared.decode import decoder

    lab, clip, vae = load_model("unet")
    text = clip.encode_from_tokens_scheduled(clip.tokenize("a comic portrait"))
    scorer = LabScorer("a happy person, red hair, glasses", decoder(vae), load_reader())

    def score(strength, form):
        ours = steered(lab, strength, form, scorer=scorer)
        out = toy.sample(ours, 1.0, positive=text, negative=text, steps=4, start=toy.noise(5, 2))
        with torch.inference_mode():
            return float(scorer(out).mean())

    plain = score(0.0, "estimate")
    assert score(0.5, "estimate") > score(0.1, "estimate") > plain + 0.5
    assert score(0.5, "network") > plain + 0.5
