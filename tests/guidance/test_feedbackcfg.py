import math

import pytest
import torch
import toy
from steer.patches.guidance import cfgpp, feedbackcfg
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, low=1.0, high=12.0, count=23, fidelity=1.0, schedule=ALWAYS):
    return feedbackcfg.apply(model, low, high, count, fidelity, schedule)


def best(D_c, D_u, candidates, fidelity):
    """The candidate with the best score of one item, every D_w built, in float64."""
    D_c, D_u = D_c.double(), D_u.double()
    d = D_c - D_u
    scores = []
    for w in candidates:
        D_w = D_u + w * d
        alignment = float(torch.corrcoef(torch.stack([D_w.flatten(), d.flatten()]))[0, 1])
        scores.append(alignment - fidelity * abs(math.log(float(D_w.std() / D_c.std()))))
    return candidates[max(range(len(candidates)), key=scores.__getitem__)]


def oracle(model, fidelity, chosen):
    """The greedy search, as a cfg function of the host."""
    candidates = [1.0 + 0.5 * i for i in range(23)]

    def cfg_function(args):
        out, step = [], []
        for D_c, D_u in zip(args["cond_denoised"], args["uncond_denoised"], strict=True):
            w = best(D_c, D_u, candidates, fidelity)
            out.append(D_u + w * (D_c - D_u))
            step.append(w)
        chosen.append(step)
        return args["input"] - torch.stack(out)

    model = model.clone()
    model.set_model_sampler_cfg_function(cfg_function)
    return model


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("fidelity", [0.3, 1.0])
def test_equals_the_greedy_search_item_by_item(kind, fidelity):
    model, chosen = toy.model(kind=kind), []
    start = toy.noise(batch=2)
    theirs = toy.sample(oracle(model, fidelity, chosen), start=start, steps=6)
    ours = toy.sample(steered(model, fidelity=fidelity), start=start, steps=6)
    assert len({w for step in chosen for w in step}) > 1  # it does choose
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("shape", [(2, 16, 50), (2, 4, 8, 8), (2, 16, 3, 6, 6)], ids=["audio", "image", "video"])
def test_items_choose_for_themselves_over_everything_else(shape):
    g = torch.Generator().manual_seed(0)
    D_c = torch.randn(shape, generator=g)
    d = torch.randn(shape, generator=g) * torch.tensor([0.1, 0.5]).view(-1, *[1] * (len(shape) - 1))
    term, w = feedbackcfg.FeedbackCFG(fidelity=1.0), torch.linspace(1.0, 12.0, 23)
    picked = w[term.score(D_c, d, w).argmax(1)].tolist()
    assert picked == [best(D_c[i], D_c[i] - d[i], w.tolist(), 1.0) for i in range(2)]
    assert picked[0] > picked[1]  # a small difference bears a larger weight


def test_without_fidelity_it_is_cfg_at_the_highest_and_with_nothing_else_at_one(model):
    for fidelity, w in ((0.0, 12.0), (1e6, 1.0)):
        ours, cfg = toy.sample(steered(model, fidelity=fidelity), cfg=3.0), toy.sample(model, cfg=w)
        assert (ours - cfg).abs().max() <= 1e-4 * cfg.abs().max()


def test_a_curve_blends_with_the_samplers_cfg(model):
    full, plain = toy.sample(steered(model), steps=1), toy.sample(model, steps=1)
    quarter = toy.sample(steered(model, schedule=Schedule(curve=(0.25, 0.25))), steps=1)
    assert torch.allclose(quarter, plain.lerp(full, 0.25), rtol=1e-4, atol=1e-4 * float(plain.std()))


def test_no_forward_of_its_own(model):
    for cfg in (5.0, 1.0):  # at cfg 1 it needs the negative all the same
        with toy.count_forwards(model) as count:
            toy.sample(steered(model), cfg=cfg)
        assert (count.calls, count.rows) == (4, 8)


def test_equal_prompts_give_no_nan(model):
    out = toy.sample(steered(model), negative=toy.POSITIVE)
    assert out.isfinite().all()
    flat = torch.ones(1, 4, 8, 8)
    assert feedbackcfg.FeedbackCFG().score(flat, flat * 0, torch.linspace(1.0, 12.0, 3)).isfinite().all()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"low": float("nan")}, "low nan"),
        ({"high": float("inf")}, "high inf"),
        ({"low": 5.0, "high": 2.0}, "high 2.0 must be a finite number from 5"),
        ({"count": 1}, "candidates 1 must be a finite number from 2"),
        ({"fidelity": -1.0}, "fidelity -1.0"),
    ],
)
def test_bad_input_raises_in_the_node(model, change, text):
    with pytest.raises(ValueError, match=f"SteerFeedbackCFG: {text}"):
        steered(model, **change)


def test_beside_another_weight_it_is_refused(model):
    with pytest.raises(ValueError, match="sets the guidance weight, and so does"):
        toy.sample(cfgpp.apply(steered(model), 0.6, ALWAYS))
    with pytest.raises(ValueError, match="SteerFeedbackCFG: the model carries it twice at the same time"):
        toy.sample(steered(steered(model), 2.0))
