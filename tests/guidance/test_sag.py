import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_sag import SelfAttentionGuidance
from steer.patches.guidance import adaptiveguidance, pag, sag
from steer.patches.shared.attention import AttnCall
from steer.patches.shared.layers import Layer
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()


@pytest.fixture(scope="module")
def model():
    return toy.model()


def near(a, b, share=1e-4):
    return (a - b).abs().max() <= share * b.abs().max()


def test_received_is_the_map_summed_over_queries():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, 8, generator=g) for _ in "qkv")
    head = lambda t, h: t[:, :, 4 * h : 4 * h + 4]  # noqa: E731
    maps = [(head(q, h) @ head(k, h).mT / 2).softmax(-1) for h in range(2)]
    expected = ((maps[0] + maps[1]) / 2).sum(1)
    assert torch.allclose(sag.received(AttnCall(q, k, v, 2, Layer("middle", 0))), expected, atol=1e-5)
    assert torch.allclose(expected.sum(1), torch.tensor(12.0))


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (32, 16)])
def test_equals_core_where_its_kernel_holds_the_gaussian(model, size):
    """Core's kernel has 9 taps: sigma 1 is whole in it. On eps models, with CFG, both are the paper's."""
    start = toy.noise(height=size[0], width=size[1])
    core = SelfAttentionGuidance.execute(model, 0.5, 1.0).result[0]
    ours = sag.apply(model, 0.5, 1.0, ALWAYS)
    assert near(toy.sample(ours, start=start), toy.sample(core, start=start))
    assert not near(toy.sample(ours, start=start), toy.sample(model, start=start), 1e-3)


def test_noise_of_a_flow_model_is_kept():
    """x = (1 - s) D + s n: degrading D by d moves x by (1 - s) d. Core moves it by d."""
    flow = toy.model(kind="flow")
    seen = []
    handle = flow.model.diffusion_model.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    first = {}
    keep = lambda step, x0, x, total: first.update({step: (x0.clone(), x.clone())})  # noqa: E731
    sigmas = torch.tensor([0.6, 0.3, 0.0])
    toy.sample(flow, cfg=1.0, sigmas=sigmas, callback=keep)
    D = first[0][0]
    seen.clear()
    toy.sample(sag.apply(flow, 0.5, 1.0, ALWAYS), cfg=1.0, sigmas=sigmas)
    handle.remove()
    moved = seen[1] - seen[0]
    places = moved.abs().amax(1, keepdim=True) > 0
    assert places.any()
    expected = 0.4 * (sag.blur(D, 1.0) - D) * places
    assert near(moved, expected)


def test_without_cfg_the_positive_is_looked_at(model):
    out, plain = (toy.sample(m, cfg=1.0) for m in (sag.apply(model, 1.0, 2.0, ALWAYS), model))
    assert out.isfinite().all() and not near(out, plain, 1e-3)


def test_rows_in_separate_calls_give_the_same(model, monkeypatch):
    start = toy.noise(batch=2)
    joined = toy.sample(sag.apply(model, 1.0, 2.0, ALWAYS), start=start)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    assert near(toy.sample(sag.apply(model, 1.0, 2.0, ALWAYS), start=start), joined)


def test_an_area_of_the_positive_leaves_the_negative_whole(model):
    positive = toy.text(1) + toy.text(3, area=(8, 8, 4, 2), strength=0.8)
    assert toy.sample(sag.apply(model, 1.0, 2.0, ALWAYS), positive=positive).isfinite().all()


def test_beside_pag_it_costs_one_forward_more(model):
    both = sag.apply(pag.apply(model, 3.0, "auto", ALWAYS), 0.5, 2.0, ALWAYS)
    with toy.count_forwards(model) as count:
        out = toy.sample(both, steps=3)
    assert (count.calls, count.rows) == (6, 12) and out.isfinite().all()
    single = pag.apply(model, 3.0, "auto", ALWAYS), sag.apply(model, 0.5, 2.0, ALWAYS)
    alone = [toy.sample(m, steps=1) for m in single]
    plain = toy.sample(model, steps=1)
    assert near(toy.sample(both, steps=1) - plain, alone[0] + alone[1] - 2 * plain, 1e-3)


def test_adaptive_guidance_waits_for_it(model):
    """It could not look at a negative whose rows are left out."""
    looked = sag.apply(model, 0.5, 2.0, ALWAYS)
    both = adaptiveguidance.apply(looked, -1.0, ALWAYS)
    start = toy.noise(batch=2)
    assert near(toy.sample(both, start=start), toy.sample(looked, start=start), 1e-6)


def test_models_without_the_map_are_refused():
    with pytest.raises(ValueError, match="SteerSAG: "):
        sag.apply(toy.flux(), 0.5, 2.0, ALWAYS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_values(model, value):
    with pytest.raises(ValueError, match="SteerSAG: scale .* finite number from 0"):
        sag.apply(model, value, 2.0, ALWAYS)
    with pytest.raises(ValueError, match="SteerSAG: blur_sigma .* finite number from 0"):
        sag.apply(model, 0.5, value, ALWAYS)
