import pytest
import torch
import toy
from steer.patches.guidance import apg
from steer.patches.shared.schedule import Schedule


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, eta=0.0, r=15.0, beta=-0.5, schedule=Schedule()):
    return apg.apply(model, eta, r, beta, schedule)


def oracle(model, eta, r, beta):
    """The paper's algorithm, item by item in float64, as a cfg function of the host."""
    average = {}

    def cfg_function(args):
        out = []
        for i in range(args["input"].shape[0]):
            positive, negative = (args[k][i].double() for k in ("cond_denoised", "uncond_denoised"))
            diff = positive - negative + beta * average.get(i, 0.0)
            average[i] = diff
            if r > 0:
                diff = diff * min(1.0, r / float(diff.norm()))
            unit = positive / positive.norm()
            parallel = (diff * unit).sum() * unit
            out.append(positive + (args["cond_scale"] - 1) * (diff - parallel + eta * parallel))
        return args["input"] - torch.stack(out).float()

    model = model.clone()
    model.set_model_sampler_cfg_function(cfg_function)
    return model


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("eta, r, beta", [(0.0, 15.0, -0.5), (0.5, 0.0, 0.0), (1.0, 3.0, 0.3), (-1.0, 40.0, -0.75)])
def test_equals_the_papers_algorithm(kind, eta, r, beta):
    model = toy.model(kind=kind)
    start = toy.noise(batch=2)
    ours = toy.sample(steered(model, eta, r, beta), start=start, steps=6)
    theirs = toy.sample(oracle(model, eta, r, beta), start=start, steps=6)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
    assert not torch.allclose(ours, toy.sample(model, start=start, steps=6), rtol=1e-2)


@pytest.mark.parametrize("w", [2.0, 7.5])
def test_neutral_settings_are_cfg_at_the_same_weight(model, w):
    ours, cfg = toy.sample(steered(model, 1.0, 0.0, 0.0), cfg=w), toy.sample(model, cfg=w)
    assert torch.allclose(ours, cfg, rtol=1e-4, atol=1e-5 * float(cfg.std()))


def test_no_forward_of_its_own_and_nothing_at_cfg_one(model):
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model), cfg=1.0)
    assert (count.calls, count.rows) == (4, 4)
    assert torch.equal(out, toy.sample(model, cfg=1.0))


def test_a_curve_blends_with_cfg(model):
    """One step, so that momentum has nothing to remember: D is linear in the weight."""
    full, plain = toy.sample(steered(model), steps=1), toy.sample(model, steps=1)
    half = toy.sample(steered(model, schedule=Schedule(curve=(0.25, 0.25))), steps=1)
    assert torch.allclose(half, plain.lerp(full, 0.25), rtol=1e-4, atol=1e-4 * float(plain.std()))


@pytest.mark.parametrize("shape", [(2, 16, 50), (2, 4, 8, 8), (2, 16, 3, 6, 6)], ids=["audio", "image", "video"])
def test_projection_and_norm_are_per_item_over_everything_else(shape):
    g = torch.Generator().manual_seed(0)
    d, onto = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    parallel = apg.project(d, onto)
    for i in range(2):
        unit = onto[i] / onto[i].norm()
        assert torch.allclose(parallel[i], (d[i] * unit).sum() * unit, atol=1e-5)
        assert apg.norm(d)[i].flatten() == pytest.approx(float(d[i].norm()))
    assert ((d - parallel) * onto).flatten(1).sum(1).abs().max() < 1e-3


def test_zero_prediction_gives_no_nan():
    d = torch.ones(1, 4, 2, 2)
    assert torch.equal(apg.project(d, torch.zeros_like(d)), torch.zeros_like(d))


def test_second_evaluation_of_a_level_does_not_feed_momentum_twice(model):
    """heun evaluates each level twice; the direction remembered is that of the level before, never of itself."""

    class Calls:
        state = {}
        run = type("Run", (), {"state": state})()

    term, d = apg.APG(Schedule(), 0.0, 15.0, -0.5), torch.ones(1, 1)
    call = Calls()
    seen = []
    for call.level, value in ((10.0, 1.0), (5.0, 2.0), (5.0, 3.0), (1.0, 4.0)):
        seen.append(float(term._momentum(d * value, call)))
    assert seen == [1.0, 2.0 - 0.5 * 1.0, 3.0 - 0.5 * 1.0, 4.0 - 0.5 * 2.5]


def test_momentum_starts_afresh_in_each_run(model):
    term = steered(model)
    first = toy.sample(term)
    toy.sample(term, start=toy.noise(9, height=24))  # another size in between
    assert torch.equal(toy.sample(term), first)


def test_two_at_once_raise(model):
    with pytest.raises(ValueError, match="SteerAPG: the model carries it twice at the same time"):
        toy.sample(steered(steered(model), eta=0.5))


def test_two_one_after_the_other(model):
    twice = steered(steered(model, schedule=Schedule(0.0, 0.5)), eta=0.5, schedule=Schedule(0.5, 1.0))
    assert toy.sample(twice).isfinite().all()


def test_on_a_flow_transformer():
    model = toy.flux()
    assert not torch.equal(toy.sample(steered(model)), toy.sample(model))
