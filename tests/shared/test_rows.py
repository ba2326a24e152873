"""Rows that share what they have in common: exact, as cheap as can be, and out of the way where it is not safe."""

import comfy.samplers
import pytest
import torch
import toy
from comfy_extras import nodes_freelunch, nodes_hypertile, nodes_nag, nodes_tomesd
from steer.patches.guidance import pag, seg, slg
from steer.patches.shared.architectures import unet
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import SHARE
from torch.utils.flop_counter import FlopCounterMode

ALWAYS = Schedule()
LAYERS = ["input.1", "input.3", "middle", "output.0", "output.1", "output.3"]


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def double():
    return toy.model(dtype=torch.float64)


def apart(model):
    """The same model with every row computed from the start."""
    model = model.clone()
    model.model_options[SHARE] = False
    return model


def near(a, b, share=2e-5):
    return (a - b).abs().max() <= share * b.abs().max()


def outputs(model, **options):
    """What the network says in each forward of one step."""
    seen = []
    handle = model.model.diffusion_model.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    toy.sample(model, steps=1, **options)
    handle.remove()
    return seen


def hooks(model):
    modules = model.model.diffusion_model.modules()
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


def flops(model, **options):
    with FlopCounterMode(display=False) as counter:
        toy.sample(model, steps=1, **options)
    return counter.get_total_flops()


def prefix(model, layer):
    """FLOPs of one row in the blocks before the first perturbed one."""
    blocks = unet.blocks(model.model.diffusion_model)
    first = next(n for n, b in enumerate(blocks) if str(b.layer) == layer and b.attends)
    counted, counter = [], FlopCounterMode(display=False)
    handles = [
        b.module.register_forward_pre_hook(lambda *_, n=n: counted.append((n, counter.get_total_flops())))
        for n, b in enumerate(blocks)
    ]
    with counter:
        toy.sample(model, steps=1, cfg=1.0)
    for handle in handles:
        handle.remove()
    return dict(counted)[first] - dict(counted)[0]


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_exact_at_every_fork(double, layer, cfg):
    steered = pag.apply(double, 3.0, layer, ALWAYS)
    options = dict(cfg=cfg, start=toy.noise(batch=2, height=16, width=24))
    (shared,), (alone,) = outputs(steered, **options), outputs(apart(steered), **options)
    assert shared.dtype == torch.float64
    assert (shared - alone).abs().max() <= 1e-12 * alone.abs().max()


def test_several_forks_in_one_forward(double):
    steered = pag.apply(double, 3.0, "output.1", ALWAYS)
    steered = seg.apply(slg.apply(steered, 2.0, "input.3", ALWAYS), 2.0, 3.0, "middle", ALWAYS)
    start = toy.noise(batch=2)
    (shared,), (alone,) = outputs(steered, start=start), outputs(apart(steered), start=start)
    assert shared.shape[0] == 10
    assert (shared - alone).abs().max() <= 1e-12 * alone.abs().max()


def test_a_wrong_row_would_be_seen(double):
    """The rows differ from each other by far more than the tolerance."""
    (out,) = outputs(pag.apply(double, 3.0, "output.3", ALWAYS))
    positive, weak, negative = out
    assert (positive - weak).abs().max() > 1e-3 and (positive - negative).abs().max() > 1e-3


@pytest.mark.parametrize("layer", ["input.3", "middle", "output.1"])
@pytest.mark.parametrize("both", [True, False])
def test_with_a_controlnet(model, layer, both):
    control = toy.controlnet(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    rows = []
    count = lambda module, args, kwargs: rows.append(kwargs["x"].shape[0])  # noqa: E731
    handle = control.control_model.register_forward_pre_hook(count, with_kwargs=True)
    controlled = lambda cond: [[c, {**o, "control": control}] for c, o in cond]  # noqa: E731
    conds = dict(positive=controlled(toy.POSITIVE), negative=controlled(toy.NEGATIVE) if both else toy.NEGATIVE)
    steered = pag.apply(model, 3.0, layer, ALWAYS)
    shared = toy.sample(steered, steps=1, **conds)
    counted, rows[:] = rows[:], []
    assert near(shared, toy.sample(apart(steered), steps=1, **conds))
    handle.remove()
    assert not near(shared, toy.sample(steered, steps=1), 1e-3)
    assert (counted, rows) == (([2], [3]) if both else ([1], [2]))


def test_areas_and_prompts_of_unequal_length(model):
    positive = toy.text(1, 154) + toy.text(3, area=(8, 8, 4, 2), strength=0.8)
    steered = pag.apply(model, 3.0, "output.1", ALWAYS)
    assert near(toy.sample(steered, positive=positive), toy.sample(apart(steered), positive=positive))


def test_only_the_rows_that_are_in_one_call_share(model, monkeypatch):
    steered = pag.apply(model, 3.0, "output.1", ALWAYS)
    joined = toy.sample(steered)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    assert near(toy.sample(steered), joined)


# --- as cheap as can be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_costs_the_bound(model, layer, cfg):
    """Two rows and what the weak row does not share, 2F + (F - P); a little below, since V is not attended to."""
    rows, F = (1 if cfg == 1.0 else 2), flops(model, cfg=1.0)
    bound = rows * F + F - prefix(model, layer)
    cost = flops(pag.apply(model, 3.0, layer, ALWAYS), cfg=cfg)
    assert 0.97 * bound < cost <= 1.01 * bound


def test_a_skipped_block_costs_nothing(model):
    assert flops(slg.apply(model, 3.0, "middle", ALWAYS)) < flops(pag.apply(model, 3.0, "middle", ALWAYS))


def test_the_log_counts_what_was_run(model, caplog):
    with caplog.at_level("INFO"):
        toy.sample(slg.apply(model, 3.0, "output.3", ALWAYS), steps=1, cfg=1.0)
    share = float(caplog.text.rsplit("weak:SLG[output.3] 1 rows = ")[-1].split(")")[0])
    true = flops(slg.apply(model, 3.0, "output.3", ALWAYS), cfg=1.0) / flops(model, cfg=1.0) - 1
    assert abs(share - true) < 0.05


# --- beside other nodes ---------------------------------------------------------------------------------------------


def test_patches_of_others_see_one_number_of_rows(model):
    """In every block, rows and what the options say of them agree."""
    seen = []

    def check(h, options):
        seen.append((h.shape[0], len(options["cond_or_uncond"]), len(options["uuids"])))
        return h

    def check_skip(h, hsp, options):
        seen.append((h.shape[0], hsp.shape[0], len(options["cond_or_uncond"])))
        return h, hsp

    other = model.clone()
    other.set_model_input_block_patch(check)
    other.set_model_output_block_patch(check_skip)
    toy.sample(pag.apply(other, 3.0, "output.1", ALWAYS), steps=1)
    assert all(len(set(each)) == 1 for each in seen)
    assert {each[0] for each in seen} == {2, 3}


@pytest.mark.parametrize("layer", ["middle", "output.1"])
def test_freeu(model, layer):
    other = nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0]
    steered = pag.apply(other, 3.0, layer, ALWAYS)
    assert near(toy.sample(steered), toy.sample(apart(steered)))


def test_hypertile(model):
    """It folds tiles into the batch around attention."""
    tiled = nodes_hypertile.HyperTile.execute(model, 64, 1, 0, False)[0]
    steered = slg.apply(tiled, 3.0, "middle", ALWAYS)
    start = toy.noise(height=32, width=32)
    out = toy.sample(steered, start=start)
    assert out.isfinite().all() and not near(out, toy.sample(tiled, start=start), 1e-3)


def test_a_node_that_lets_rows_act_on_each_other_switches_it_off(model):
    """NAG mixes the negative into the positive: a weak row that began as the positive would have it too."""
    other = nodes_nag.NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]
    steered = pag.apply(other, 3.0, "output.1", ALWAYS)
    assert torch.equal(toy.sample(steered), toy.sample(apart(steered)))


def test_token_merging_beside_skipped_layers(model):
    merged = nodes_tomesd.TomePatchModel.execute(model, 0.3)
    merged = merged[0] if isinstance(merged, tuple) else merged.result[0]
    assert toy.sample(slg.apply(merged, 3.0, "middle", ALWAYS), start=toy.noise(height=32, width=32)).isfinite().all()


@pytest.mark.parametrize("both", [True, False])
def test_a_patch_that_brings_rows_for_the_whole_batch_switches_it_off(model, caplog, both):
    control = toy.controlnet(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    controlled = lambda cond: [[c, {**o, "control": control}] for c, o in cond] if both else cond  # noqa: E731
    bias = torch.randn(3, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    other = model.clone()
    other.set_model_input_block_patch(lambda h, options: h + bias if options["block"] == ("input", 0) else h)
    steered = pag.apply(other, 3.0, "output.1", ALWAYS)
    conds = dict(positive=controlled(toy.POSITIVE), negative=controlled(toy.NEGATIVE))
    assert near(toy.sample(steered, **conds), toy.sample(apart(steered), **conds))
    assert caplog.text.count("Steer: another node cannot follow shared rows, so every row is computed in full") == 1


def test_an_error_of_its_own_is_raised(model):
    """It fails without sharing too."""
    broken = model.clone()
    broken.set_model_input_block_patch(lambda h, options: h + torch.randn(7, 64, 1, 1))
    with pytest.raises(RuntimeError, match="size of tensor"):
        toy.sample(pag.apply(broken, 3.0, "output.1", ALWAYS))


def compiled(model):
    """A model that carries the mark of the host's TorchCompileModel, with a compiler that does nothing."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    return model


def test_a_compiled_model_does_not_share(model):
    steered = compiled(pag.apply(model, 3.0, "output.1", ALWAYS))
    plain = pag.apply(model, 3.0, "output.1", ALWAYS)
    assert near(toy.sample(steered, steps=1), toy.sample(plain, steps=1), 1e-4)
    with pytest.raises(ValueError, match="Steer: the model is compiled, so that blocks cannot be steered"):
        toy.sample(compiled(slg.apply(model, 3.0, "middle", ALWAYS)), steps=1)


# --- what it leaves -------------------------------------------------------------------------------------------------


def test_no_hook_outlives_the_forward(model):
    before = hooks(model)
    steered = slg.apply(pag.apply(model, 3.0, "output.1", ALWAYS), 2.0, "input.3", ALWAYS)
    expected = toy.sample(steered)
    broken = steered.clone()

    def fail(h, hsp, options):
        raise RuntimeError("another node fails")

    broken.set_model_output_block_patch(fail)
    with pytest.raises(RuntimeError, match="another node fails"):
        toy.sample(broken)
    assert hooks(model) == before
    assert torch.equal(toy.sample(steered), expected)


def test_at_scale_0_nothing_is_shared(model):
    assert torch.equal(toy.sample(pag.apply(model, 0.0, "output.1", ALWAYS)), toy.sample(model))
