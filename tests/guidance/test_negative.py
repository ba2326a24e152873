import comfy.hooks
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Guider_Basic
from steer.patches.guidance import negative, pag
from steer.patches.shared.conditioning import digest
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
FIRST, SECOND = toy.text(11), toy.text(12)


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, conditioning=FIRST, scale=3.0, schedule=ALWAYS):
    return negative.apply(model, conditioning, scale, schedule)


def oracle(model, minus, cfg=5.0, share=1.0, **options):
    """D_0 + w (D_p - D_0) - sum w_i (D_i - D_0), each D in a host call of its own. minus: [(conditioning, w_i)].

    share: where D_i counts, [1, 1, H, W].
    """

    class Minus(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            def D(name):
                return comfy.samplers.calc_cond_batch(
                    self.inner_model, [self.conds[name]], x, timestep, model_options
                )[0]

            D_0, D_p = D("negative"), D("positive")
            out = D_0 + cfg * (D_p - D_0)
            for i, (_, w) in enumerate(minus):
                out = out - w * share * (D(f"minus{i}") - D_0)
            return out

    guider = Minus(model)
    guider.inner_set_conds({"positive": toy.POSITIVE, "negative": toy.NEGATIVE})
    guider.inner_set_conds({f"minus{i}": c for i, (c, _) in enumerate(minus)})
    return toy.sample(model, guider=guider, **options)


def near(a, b, share=2e-5):
    return (a - b).abs().max() <= share * b.abs().max()


@pytest.mark.parametrize("w", [2.0, 7.5])
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_scale_of_cfg_minus_one_is_the_prompt_as_negative(kind, w):
    model = toy.model(kind=kind)
    ours = toy.sample(steered(model, scale=w - 1), cfg=w)
    assert near(ours, toy.sample(model, cfg=w, negative=FIRST), 1e-4)
    assert not near(ours, toy.sample(model, cfg=w), 1e-2)


def test_two_negatives_are_the_formula_in_one_call(model):
    ours = steered(steered(model, FIRST, 3.0), SECOND, 0.5)
    with toy.count_forwards(model) as count:
        out = toy.sample(ours)
    assert (count.calls, count.rows) == (4, 16)
    assert near(out, oracle(model, [(FIRST, 3.0), (SECOND, 0.5)]))


def test_each_has_a_window_of_its_own(model):
    ours = steered(steered(model, FIRST, 3.0, Schedule(0.0, 0.4)), SECOND, 1.0, Schedule(0.4, 1.0))
    sampling = model.get_model_object("model_sampling")
    steps = len([s for s in toy.sigmas(model, 8)[:-1] if s > sampling.percent_to_sigma(0.4)])
    assert 0 < steps < 8
    with toy.count_forwards(model) as count:
        toy.sample(ours, steps=8)
    assert (count.calls, count.rows) == (8, 24)
    with toy.count_forwards(model) as count:
        toy.sample(steered(model, FIRST, 3.0, Schedule(0.0, 0.4)), steps=8)
    assert (count.calls, count.rows) == (8, 16 + steps)


def test_equal_texts_are_one_prediction_whichever_tensors_hold_them(model):
    twice = steered(steered(model, FIRST, 1.0), toy.text(11), 2.0)
    with toy.count_forwards(model) as count:
        out = toy.sample(twice)
    assert count.rows == 12
    assert near(out, toy.sample(steered(model, FIRST, 3.0)))


def test_order_of_nodes_does_not_matter(model):
    one = pag.apply(steered(steered(model, FIRST, 3.0), SECOND, 1.0), 2.0, "auto", ALWAYS)
    other = steered(steered(pag.apply(model, 2.0, "auto", ALWAYS), SECOND, 1.0), FIRST, 3.0)
    assert torch.equal(toy.sample(one), toy.sample(other))


@pytest.mark.parametrize("change", ["value", "length", "area", "strength", "dtype"])
def test_digest_tells_conditionings_apart(change):
    same, other = toy.text(11), toy.text(11)
    assert digest(same) == digest(FIRST)
    if change == "value":
        other[0][0][0, 0, 0] += 1
    elif change == "length":
        other = toy.text(11) + toy.text(11)
    elif change == "dtype":
        other[0][0] = other[0][0].half()
    else:
        other[0][1][change] = {"area": (8, 8, 0, 0), "strength": 0.5}[change]
    assert digest(other) != digest(same)


def test_mask_limits_it_to_its_place(model):
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1.0
    masked = toy.text(11, mask=mask, mask_strength=1.0, set_area_to_bounds=False)
    ours = toy.sample(steered(model, masked), steps=3)
    assert near(ours, oracle(model, [(FIRST, 3.0)], share=mask[None], steps=3))
    first, plain = (toy.sample(m, steps=1) for m in (steered(model, masked), model))
    assert near(first[..., 8:], plain[..., 8:]) and not near(first[..., :8], plain[..., :8], 1e-2)


def test_area_limits_it_to_its_place(model):
    area = toy.text(11, area=(8, 8, 4, 2), strength=1.0)
    share = torch.zeros(1, 1, 16, 16)
    share[..., 4:12, 2:10] = 1.0
    ours = toy.sample(steered(model, area), steps=3)
    assert near(ours, oracle(model, [(area, 3.0)], share=share, steps=3))


def test_timestep_range_switches_it_off_outside(model):
    late = toy.text(11, start_percent=0.4, end_percent=1.0)
    seen = {}

    def keep(name):
        return lambda step, x0, x, total: seen.setdefault(name, x0.clone())

    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, late), steps=6, callback=keep("ours"))
    plain = toy.sample(model, steps=6, callback=keep("plain"))
    assert near(seen["ours"], seen["plain"]) and not near(out, plain, 1e-2)
    assert 12 < count.rows < 18


def test_a_controlnet_of_its_own(model):
    control = toy.controlnet(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    controlled = toy.text(11, control=control, control_apply_to_uncond=False)
    ours = toy.sample(steered(model, controlled), steps=3)
    assert near(ours, oracle(model, [(controlled, 3.0)], steps=3), 1e-4)
    assert not near(ours, toy.sample(steered(model), steps=3), 1e-3)


@pytest.mark.parametrize("tokens", [100, 154])
def test_a_prompt_of_another_length(model, tokens):
    longer = toy.text(11, tokens)
    assert near(toy.sample(steered(model, longer), steps=3), oracle(model, [(longer, 3.0)], steps=3))


def test_equal_to_the_samplers_negative_it_changes_nothing(model):
    assert near(toy.sample(steered(model, toy.NEGATIVE, 9.0)), toy.sample(model), 1e-4)


def test_at_cfg_one_it_still_pushes_away(model):
    assert near(toy.sample(steered(model), cfg=1.0), oracle(model, [(FIRST, 3.0)], cfg=1.0))


def test_needs_a_negative(model):
    guider = Guider_Basic(steered(model))
    guider.set_conds(toy.POSITIVE)
    with pytest.raises(ValueError, match="SteerNegative: needs a negative conditioning.*use KSampler"):
        toy.sample(model, guider=guider)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_bad_scale_raises_in_the_node(model, scale):
    with pytest.raises(ValueError, match=f"SteerNegative: scale {scale}"):
        steered(model, scale=scale)


def test_an_empty_conditioning_raises_in_the_node(model):
    with pytest.raises(ValueError, match="SteerNegative: its conditioning is empty"):
        steered(model, [])


def test_another_text_encoders_width_raises_before_sampling(model):
    with toy.count_forwards(model) as count:
        with pytest.raises(ValueError, match="SteerNegative: its conditioning has tokens of width 48, .* of width 64"):
            toy.sample(steered(model, toy.text(11, width=48)))
    assert count.calls == 0


def test_hooks_are_refused_in_the_node(model):
    hooked = toy.text(11, hooks=comfy.hooks.HookGroup())
    with pytest.raises(ValueError, match="SteerNegative: its conditioning carries hooks .* take the hooks off it"):
        steered(model, hooked)


@pytest.mark.parametrize("minus", [[FIRST], [FIRST, SECOND]])
def test_other_packs_find_every_text_where_they_look_for_it(model, minus):
    """0 are rows of the positive, 1 those of a negative, ours among them."""
    seen = []

    def look(n, context, value, extra):
        chunks = context.chunk(len(extra["cond_or_uncond"]))
        seen.append({i: [c for c, j in zip(chunks, extra["cond_or_uncond"], strict=True) if j == i] for i in (0, 1)})
        return n, context, value

    patched = model.clone()
    patched.set_model_attn2_patch(look)
    for conditioning in minus:
        patched = steered(patched, conditioning)
    toy.sample(patched, steps=1)
    assert seen
    for found in seen:
        assert [torch.equal(c, toy.POSITIVE[0][0]) for c in found[0]] == [True]
        negatives = [toy.NEGATIVE, *minus]
        assert sorted(float(c.sum()) for c in found[1]) == sorted(float(n[0][0].sum()) for n in negatives)
