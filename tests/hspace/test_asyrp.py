import pytest
import torch
import toy
from comfy.patcher_extension import WrappersMP
from steer.patches.hspace import asymmetricsampler, asyrp
from steer.patches.hspace.direction import Direction
from steer.patches.shared.layers import Layer
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import fingerprint


def some(model, seed=30, size=16):
    """A direction that differs at every level."""
    sigmas = toy.sigmas(model)[:-1]
    dh = torch.stack([toy.noise(seed + i, 1, size // 2, size // 2, 128)[0] for i in range(len(sigmas))])
    return Direction(sigmas, dh, Layer("middle", 0), (4, size, size), fingerprint(model))


def steered(model, strength=2.0, schedule=Schedule(), direction=None):
    return asyrp.apply(model, direction or some(model), strength, schedule)


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def oracle(model, add):
    """The host's own patch adds `add(sigma)` to h."""
    clone = model.clone()

    def put(h, hsp, options):
        return (h + add(float(options["sigmas"][0])) if options["block"] == ("output", 0) else h), hsp

    clone.set_model_output_block_patch(put)
    return clone


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_adds_the_direction_of_this_noise_level(kind):
    model = toy.model(kind=kind)
    direction = some(model)
    other = oracle(model, lambda s: -1.5 * direction.dh[int((direction.sigmas - s).abs().argmin())])
    out = toy.sample(steered(model, -1.5, direction=direction))
    assert near(out, toy.sample(other)) and not near(out, toy.sample(model), 1e-3)


def test_several_add_up_in_any_order():
    model = toy.model()
    one, two = some(model), some(model, 60)
    other = oracle(model, lambda s: one.at(s) + 2 * two.at(s))
    both = steered(steered(model, 1.0, direction=one), 2.0, direction=two)
    swapped = steered(steered(model, 2.0, direction=two), 1.0, direction=one)
    assert near(toy.sample(both), toy.sample(other)) and near(toy.sample(swapped), toy.sample(both), 1e-5)


@pytest.mark.parametrize("options", [dict(strength=0.0), dict(schedule=Schedule(0.5, 0.5))], ids=str)
def test_off_is_no_node(options):
    model = toy.model()
    off = steered(model, **options)
    assert not off.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
    assert torch.equal(toy.sample(off), toy.sample(model))


def test_costs_nothing_on_euler_and_one_evaluation_per_edited_step_on_its_own_sampler():
    model = toy.model()
    changed = steered(model, schedule=Schedule(0.0, 0.6))
    for sampler, calls in (("euler", 4), (asymmetricsampler.sampler(False, 0.3, 1.0), 6)):
        with toy.count_forwards(model) as count:
            toy.sample(changed, sampler=sampler)
        assert (count.calls, count.rows) == (calls, 2 * calls)


def test_batch_is_two_runs_and_nothing_else_changes():
    model = toy.model()
    before, changed = toy.sample(model), steered(model)
    both = toy.sample(changed, start=toy.noise(batch=2))
    assert near(both[:1], toy.sample(changed)) and near(both[1:], toy.sample(changed, start=toy.noise(batch=2)[1:]))
    assert torch.equal(toy.sample(changed), toy.sample(changed))
    assert torch.equal(toy.sample(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    model = toy.model(dtype=dtype)
    assert bool(toy.sample(steered(model), steps=2).isfinite().all())


def test_bad_input_raises_before_sampling():
    model = toy.model()
    with pytest.raises(ValueError, match="SteerAsyrp: strength inf must be a finite number"):
        steered(model, float("inf"))
    with pytest.raises(ValueError, match="SteerAsyrp: the direction is of another model: prediction"):
        steered(model, direction=some(toy.model(kind="v")))
    with toy.count_forwards(model) as count:
        with pytest.raises(ValueError, match=r"SteerAsyrp: the direction was found on latents of size \(4, 24, 24\)"):
            toy.sample(steered(model, direction=some(model, size=24)))
    assert count.calls == 0
