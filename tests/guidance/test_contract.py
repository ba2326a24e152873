"""What every guidance method promises, whichever it is; figures of a method are in its own file."""

import gc
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
import toy
from steer.patches.guidance import (
    adaptiveguidance,
    apg,
    autoguidance,
    betacfg,
    cfgpp,
    cfgzerostar,
    fdg,
    feedbackcfg,
    guidanceschedule,
    negative,
    pag,
    rescale,
    sag,
    seg,
    slg,
    tag,
    tcfg,
)
from steer.patches.shared.run import Call, Run
from steer.patches.shared.schedule import Schedule

STEPS = 6


def weakened(model):
    """A worse model as another pack makes one of the same network."""
    model = model.clone()
    model.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
    return model


ON = {
    "PAG": lambda m, s=Schedule(): pag.apply(m, 3.0, "auto", s),
    "PAG-layers": lambda m, s=Schedule(): pag.apply(m, 2.0, "middle, output.1-2", s),
    "SEG": lambda m, s=Schedule(): seg.apply(m, 3.0, 100.0, "auto", s),
    "SLG": lambda m, s=Schedule(): slg.apply(m, 3.0, "auto", s),
    "SAG": lambda m, s=Schedule(): sag.apply(m, 0.5, 2.0, s),
    "APG": lambda m, s=Schedule(): apg.apply(m, 0.0, 15.0, -0.5, s),
    "CFG++": lambda m, s=Schedule(): cfgpp.apply(m, 0.6, s),
    "AdaptiveGuidance": lambda m, s=Schedule(): adaptiveguidance.apply(m, -1.0, s),
    "FeedbackCFG": lambda m, s=Schedule(): feedbackcfg.apply(m, 1.0, 12.0, 23, 0.3, s),
    "AutoGuidance": lambda m, s=Schedule(): autoguidance.apply(m, weakened(m), 2.0, s),
    "Negative": lambda m, s=Schedule(): negative.apply(m, toy.text(11), 3.0, s),
    "GuidanceSchedule": lambda m, s=Schedule(): guidanceschedule.apply(m, 5.0, 9.0, "custom", s),
    "TCFG": lambda m, s=Schedule(): tcfg.apply(m, 1.0, s),
    "CFG-Zero*": lambda m, s=Schedule(): cfgzerostar.apply(m, 0.04, s),
    "TAG": lambda m, s=Schedule(): tag.apply(m, 0.3, s),
    "BetaCFG": lambda m, s=Schedule(): betacfg.apply(m, 2.0, 2.0, 1.0, False, s),
    "FDG": lambda m, s=Schedule(): fdg.apply(m, 5.0, 10.0, 1, s),
    "Rescale": lambda m, s=Schedule(): rescale.apply(m, 0.7, s),
    "all": lambda m, s=Schedule(): cfgpp.apply(apg.apply(pag.apply(m, 3.0, "auto", s), 0.3, 15.0, -0.5, s), 0.6, s),
}
OFF = {
    "PAG scale 0": lambda m: pag.apply(m, 0.0, "auto", Schedule()),
    "PAG closed": lambda m: pag.apply(m, 3.0, "auto", Schedule(0.5, 0.5)),
    "PAG curve 0": lambda m: pag.apply(m, 3.0, "auto", Schedule(curve=(0.0, 0.0))),
    "SEG scale 0": lambda m: seg.apply(m, 0.0, 100.0, "auto", Schedule()),
    "SEG blur 0": lambda m: seg.apply(m, 3.0, 0.0, "auto", Schedule()),
    "SLG scale 0": lambda m: slg.apply(m, 0.0, "auto", Schedule()),
    "SAG scale 0": lambda m: sag.apply(m, 0.0, 2.0, Schedule()),
    "SAG blur 0": lambda m: sag.apply(m, 0.5, 0.0, Schedule()),
    "APG closed": lambda m: apg.apply(m, 0.0, 15.0, -0.5, Schedule(1.0, 1.0)),
    "CFG++ strength 0": lambda m: cfgpp.apply(m, 0.0, Schedule()),
    "CFG++ closed": lambda m: cfgpp.apply(m, 0.6, Schedule(0.7, 0.3)),
    "AdaptiveGuidance threshold 1": lambda m: adaptiveguidance.apply(m, 1.0, Schedule()),
    "AdaptiveGuidance closed": lambda m: adaptiveguidance.apply(m, 0.5, Schedule(0.5, 0.5)),
    "FeedbackCFG closed": lambda m: feedbackcfg.apply(m, 1.0, 12.0, 23, 1.0, Schedule(0.5, 0.5)),
    "AutoGuidance scale 0": lambda m: autoguidance.apply(m, weakened(m), 0.0, Schedule()),
    "AutoGuidance closed": lambda m: autoguidance.apply(m, weakened(m), 2.0, Schedule(0.5, 0.5)),
    "Negative scale 0": lambda m: negative.apply(m, toy.text(11), 0.0, Schedule()),
    "Negative closed": lambda m: negative.apply(m, toy.text(11), 3.0, Schedule(0.5, 0.5)),
    "GuidanceSchedule closed": lambda m: guidanceschedule.apply(m, 1.0, 9.0, "custom", Schedule(0.7, 0.3)),
    "TCFG strength 0": lambda m: tcfg.apply(m, 0.0, Schedule()),
    "CFG-Zero* closed": lambda m: cfgzerostar.apply(m, 0.04, Schedule(0.5, 0.5)),
    "TAG scale 0": lambda m: tag.apply(m, 0.0, Schedule()),
    "BetaCFG closed": lambda m: betacfg.apply(m, 2.0, 2.0, 1.0, False, Schedule(0.5, 0.5)),
    "FDG closed": lambda m: fdg.apply(m, 5.0, 10.0, 1, Schedule(0.5, 0.5)),
    "Rescale amount 0": lambda m: rescale.apply(m, 0.0, Schedule()),
    # open, but no step falls into it: the wrappers run and change nothing
    "PAG between steps": lambda m: pag.apply(m, 3.0, "auto", Schedule(0.0101, 0.0102)),
    "CFG-Zero* between steps": lambda m: ON["CFG-Zero*"](m, Schedule(0.0101, 0.0102)),
    "FDG between steps": lambda m: ON["FDG"](m, Schedule(0.0101, 0.0102)),
    "all between steps": lambda m: ON["all"](m, Schedule(0.0101, 0.0102)),
}
on = pytest.mark.parametrize("method", ON)


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def plain(model):
    return toy.sample(model, steps=STEPS)


def close(a, b):
    """Equal up to the host's own rounding when a batch is composed differently (host.md 3: 1e-4 on a std of 20)."""
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("method", OFF)
def test_off_is_bit_equal_and_free(model, plain, method):
    with toy.count_forwards(model) as count:
        out = toy.sample(OFF[method](model), steps=STEPS)
    assert torch.equal(out, plain)
    assert (count.calls, count.rows) == (STEPS, 2 * STEPS)


@on
def test_it_acts_and_is_repeatable(model, plain, method):
    steered = ON[method](model)
    first = toy.sample(steered, steps=STEPS)
    assert (first - plain).abs().max() > 0.05 * plain.std()
    assert torch.equal(toy.sample(steered, steps=STEPS), first)


@on
def test_model_and_siblings_stay_as_they_were(model, plain, method):
    sibling = model.clone()
    toy.sample(ON[method](model), steps=STEPS)
    assert torch.equal(toy.sample(model, steps=STEPS), plain)
    assert torch.equal(toy.sample(sibling, steps=STEPS), plain)
    assert "steer" not in model.model_options and not model.model_options["transformer_options"]


@on
@pytest.mark.parametrize("error", [RuntimeError, comfy.model_management.InterruptProcessingException])
def test_an_error_in_mid_run_leaves_nothing_behind(model, plain, method, error):
    steered = ON[method](model)
    expected = toy.sample(steered, steps=STEPS)

    def stop(step, x0, x, total):
        if step == 2:
            raise error()

    with pytest.raises(error):
        toy.sample(steered, steps=STEPS, callback=stop)
    assert torch.equal(toy.sample(steered, steps=STEPS), expected)
    assert torch.equal(toy.sample(model, steps=STEPS), plain)


@on
def test_batch_of_two_equals_two_runs(model, method):
    steered = ON[method](model)
    both = toy.sample(steered, steps=STEPS, start=toy.noise(batch=2))
    for i in range(2):
        assert close(both[i : i + 1], toy.sample(steered, steps=STEPS, start=toy.noise(seed=i)))


@on
def test_separate_calls_give_the_same(model, method, monkeypatch):
    joined = toy.sample(ON[method](model), steps=STEPS)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    with toy.count_forwards(model) as count:
        apart = toy.sample(ON[method](model), steps=STEPS)
    assert count.calls == count.rows
    assert close(apart, joined)


@on
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method, dtype):
    half, full = toy.model(dtype=dtype), toy.model()
    out, exact = (toy.sample(ON[method](m), steps=2) for m in (half, full))
    assert out.isfinite().all()
    assert (out - exact).std() < 0.15 * exact.std()


@on
@pytest.mark.parametrize("size", [(13, 19), (8, 40)])
def test_odd_sizes(model, method, size):
    out = toy.sample(ON[method](model), steps=2, start=toy.noise(height=size[0], width=size[1]))
    assert out.shape[-2:] == size and out.isfinite().all()


@on
def test_prompts_of_unequal_length(model, method):
    # the host joins 77 and 154 tokens in one batch, 77 and 100 in two
    for tokens in (154, 100):
        out = toy.sample(ON[method](model), steps=2, positive=toy.text(1, tokens))
        assert out.isfinite().all()


@on
def test_area_conditioning(model, method, monkeypatch):
    positive = toy.text(1) + toy.text(3, area=(8, 8, 4, 2), strength=0.8)
    joined = toy.sample(ON[method](model), steps=3, positive=positive)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    assert close(toy.sample(ON[method](model), steps=3, positive=positive), joined)
    assert not close(joined, toy.sample(ON[method](model), steps=3))


@on
def test_inpainting_keeps_what_is_masked(model, method):
    latent = toy.noise(5)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    out = toy.sample(ON[method](model), steps=3, latent=latent, denoise_mask=mask)
    assert torch.allclose(out[..., :8], latent[..., :8], atol=1e-5)
    assert not torch.allclose(out[..., 8:], latent[..., 8:], atol=0.1)


@pytest.mark.parametrize("kind", ["v", "flow"])
@on
def test_v_and_flow_models(method, kind):
    model = toy.model(kind=kind)
    out = toy.sample(ON[method](model), steps=3)
    assert out.isfinite().all() and not torch.equal(out, toy.sample(model, steps=3))


@on
def test_inside_a_window_only(model, method):
    """The first step is out of the window, so the first x0 is plain; afterwards it is not."""
    first = {}

    def keep(name):
        return lambda step, x0, x, total: first.setdefault(name, x0.clone())

    plain = toy.sample(model, steps=STEPS, callback=keep("plain"))
    out = toy.sample(ON[method](model, Schedule(0.3, 1.0)), steps=STEPS, callback=keep("late"))
    assert torch.equal(first["plain"], first["late"]) and not torch.equal(out, plain)


@pytest.mark.parametrize("name", ON)
def test_nothing_of_a_run_waits_for_the_garbage_collector(name):
    """What a step held is freed with the step, and a steered model with its last user."""
    steered = ON[name](toy.model())
    toy.sample(steered, steps=2)  # what is made once
    gc.collect()
    gc.disable()
    try:
        toy.sample(steered, steps=2)
        alive = weakref.ref(steered)
        del steered
        assert alive() is None
        assert not [o for o in gc.get_objects() if type(o) in (Run, Call)]
    finally:
        gc.enable()
