import comfy.model_patcher
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Guider_Basic
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from steer.patches.guidance import pag
from steer.patches.shared.attention import AttnCall
from steer.patches.shared.layers import Layer
from steer.patches.shared.schedule import Schedule
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

STEPS = 4


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, scale=3.0, layers="auto", schedule=Schedule()):
    return pag.apply(model, scale, layers, schedule)


def core(model, scale=3.0):
    return PerturbedAttentionGuidance.execute(model, scale).result[0]


def one_by_one(monkeypatch):
    """Every conditioning in a forward of its own, so that no rounding of a batch differs."""
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_equals_core_at_middle(model, cfg, monkeypatch):
    one_by_one(monkeypatch)
    assert torch.equal(toy.sample(steered(model), cfg=cfg), toy.sample(core(model), cfg=cfg))


def test_several_layers_equal_replaced_layers(model, monkeypatch):
    """The oracle replaces attention on the named blocks in a forward of its own, as core does for the middle."""

    def post_cfg(args):
        options = args["model_options"].copy()
        for block in (("input", 3), ("middle", 0), ("output", 1), ("output", 2)):
            options = comfy.model_patcher.set_model_options_patch_replace(
                options, lambda q, k, v, extra: v, "attn1", *block
            )
        (weak,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - weak) * 2.0

    one_by_one(monkeypatch)
    oracle = model.clone()
    oracle.set_model_sampler_post_cfg_function(post_cfg)
    assert torch.equal(toy.sample(steered(model, 2.0, "middle, output.1-2, input.3")), toy.sample(oracle))


def test_one_host_call_where_core_needs_two(model):
    with toy.count_forwards(model) as ours:
        toy.sample(steered(model), steps=STEPS)
    with toy.count_forwards(model) as cores:
        toy.sample(core(model), steps=STEPS)
    assert (ours.calls, ours.rows) == (STEPS, 3 * STEPS)
    assert (cores.calls, cores.rows) == (2 * STEPS, 3 * STEPS)


def test_no_more_flops_than_core(model):
    def flops(m):
        with FlopCounterMode(display=False) as counter:
            toy.sample(m, steps=1)
        return counter.get_total_flops()

    assert flops(steered(model)) <= flops(core(model))


def test_without_cfg_and_without_a_negative(model):
    guider = Guider_Basic(steered(model))
    guider.set_conds(toy.POSITIVE)
    with toy.count_forwards(model) as count:
        out = toy.sample(model, guider=guider, steps=STEPS)
    assert (count.calls, count.rows) == (STEPS, 2 * STEPS)
    assert torch.equal(out, toy.sample(steered(model), cfg=1.0, steps=STEPS))


def test_only_the_window_is_paid_for(model):
    sampling = model.get_model_object("model_sampling")
    sigmas = toy.sigmas(model, 10)
    inside = sum(float(s) > float(sampling.percent_to_sigma(0.4)) for s in sigmas[:-1])
    assert 0 < inside < 10
    with toy.count_forwards(model) as count:
        toy.sample(steered(model, schedule=Schedule(0.0, 0.4)), steps=10)
    assert (count.calls, count.rows) == (10, 20 + inside)


def test_a_curve_scales(model, monkeypatch):
    half = toy.sample(steered(model, 3.0, schedule=Schedule(curve=(0.5, 0.5))), steps=1)
    assert torch.allclose(half, toy.sample(steered(model, 1.5), steps=1), rtol=1e-5, atol=1e-4)


def test_two_nodes_of_equal_layers_are_one_branch(model):
    twice = steered(steered(model, 1.0), 2.0, "middle")
    with toy.count_forwards(model) as count:
        out = toy.sample(twice, steps=STEPS)
    assert count.rows == 3 * STEPS
    assert torch.allclose(out, toy.sample(steered(model, 3.0), steps=STEPS), rtol=1e-4, atol=1e-3)


def test_replacement_of_another_node_serves_the_other_rows(model):
    """Someone else owns the middle block: their function sees the plain rows, and only those."""
    seen = []

    def theirs(q, k, v, extra):
        seen.append((q.shape[0], list(extra["cond_or_uncond"]), len(extra["uuids"])))
        return v.flip(1)

    patched = model.clone()
    patched.set_model_attn1_replace(theirs, "middle", 0)
    plain = toy.sample(patched, steps=2)
    both = toy.sample(steered(patched), steps=2)
    assert not torch.equal(both, plain)
    assert seen[2:] == [(2, [0, 1], 2)] * 2
    assert torch.equal(toy.sample(patched, steps=2), plain)


def test_patches_of_others_know_the_weak_row_as_positive(model):
    seen = set()

    def attn2(n, context, value, extra):
        seen.add(tuple(extra["cond_or_uncond"]))
        return n, context, value

    patched = steered(model)
    patched.set_model_attn2_patch(attn2)
    toy.sample(patched, steps=1)
    assert seen == {(0, 1), (0, 1, 0)}  # before and after the weak row joins


@pytest.mark.parametrize("image", [(3, 9), (0, 6), (2, 7), (0, None)], ids=["last", "first", "between", "all"])
def test_joint_attention_hides_image_tokens_from_each_other(image):
    """Text rows are those of plain attention, image rows those under the explicit mask; alone, an image token is V."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 8, generator=g, dtype=torch.float64) for _ in "qkv")
    out = pag.identity_attention(AttnCall(q, k, v, 2, Layer("double", 0), "joint", image=image))
    hidden = torch.zeros(9, 9, dtype=torch.bool)
    hidden[slice(*image), slice(*image)] = True
    hidden.fill_diagonal_(False)
    plain, masked = (
        scaled_dot_product_attention(*(t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v)), mask)
        for mask in (None, ~hidden)
    )
    text = [n for n in range(9) if n not in range(9)[slice(*image)]]
    assert torch.allclose(out[:, text], plain.transpose(1, 2).flatten(2)[:, text])
    assert torch.allclose(out, masked.transpose(1, 2).flatten(2))
    assert text or torch.allclose(out, v)


@pytest.mark.parametrize(
    "layers, text",
    [
        ("double.3", r'SteerPAG: no layer "double.3"; this model has input.1, input.3, middle, output.0-3'),
        ("all of them", "SteerPAG: layers .* cannot be read"),
    ],
)
def test_wrong_layers_raise_in_the_node(model, layers, text):
    with pytest.raises(ValueError, match=text):
        steered(model, layers=layers)


def test_refuses_a_model_it_cannot_act_on():
    with pytest.raises(ValueError, match="SteerPAG: cannot act on Gaussian"):
        steered(toy.gaussian())
