import logging

import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Guider_Basic
from steer.patches.guidance import guidanceschedule, pag, report
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, low=1.0, high=7.5, preset="custom", schedule=ALWAYS):
    return guidanceschedule.apply(model, low, high, preset, schedule)


def oracle(model, w_of, steps=STEPS, sampler="euler", start=None):
    """The host's own CFG with the cfg set anew at each sigma: a guider of the test, without our nodes."""

    class Scheduled(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            self.cfg = w_of(float(timestep.max()))
            return super().predict_noise(x, timestep, model_options, seed)

    guider = Scheduled(model)
    guider.set_conds(toy.POSITIVE, toy.NEGATIVE)
    return toy.sample(model, guider=guider, steps=steps, sampler=sampler, start=start)


def noise_to_signal(kind, sigma):
    return sigma / (1 - sigma) if kind == "flow" and sigma < 1 else sigma if kind != "flow" else float("inf")


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_limited_interval_is_the_papers_on_every_kind_of_model(kind):
    """w where 0.28 < noise / signal <= 5.42 and 1 elsewhere; sigmas of SDXL would never leave it on flow."""
    model = toy.model(kind=kind)

    def w_of(sigma):
        return 7.5 if 0.28 < noise_to_signal(kind, sigma) <= 5.42 else 1.0

    weights = [w_of(float(s)) for s in toy.sigmas(model, STEPS)[:-1]]
    inside = weights.count(7.5)
    assert weights[0] == weights[-1] == 1.0 and 5 <= inside <= 10
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, preset="limited interval"), steps=STEPS)
    assert torch.equal(out, oracle(model, w_of))
    assert (count.calls, count.rows) == (STEPS, STEPS + inside)  # one row outside, not two


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_stage_wise_is_linear_up_and_down(kind, sampler):
    """low + (high - low)(1 - |2p - 1|), p the share of the range that is done."""
    model = toy.model(kind=kind)
    sampling = model.get_model_object("model_sampling")
    grid = [float(sampling.percent_to_sigma(i / 4000)) for i in range(4001)]

    def w_of(sigma):
        p = sum(s > sigma for s in grid) / 4000
        return 2.0 + 6.0 * (1 - abs(2 * p - 1))

    ours = toy.sample(steered(model, 2.0, 8.0, "stage-wise"), steps=STEPS, sampler=sampler)
    theirs = oracle(model, w_of, sampler=sampler)
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-2 * float(theirs.std()))
    assert not torch.allclose(ours, toy.sample(model, cfg=5.0, steps=STEPS, sampler=sampler), atol=0.1)


def test_presets_begin_and_end_at_low_and_peak_in_the_middle(model):
    sampling = model.get_model_object("model_sampling")
    for preset in ("weak-strong-weak", "stage-wise"):
        window = guidanceschedule.shaped(ALWAYS, preset, sampling).resolve(sampling)
        weights = [window.weight(float(sampling.percent_to_sigma(p))) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert weights == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=3e-3)


def test_presets_are_multiplied_by_window_and_curve(model):
    sampling = model.get_model_object("model_sampling")
    both = guidanceschedule.shaped(Schedule(0.0, 0.6, (1.0, 0.0)), "stage-wise", sampling)
    assert (both.start_percent, both.end_percent) == (0.0, 0.6)
    assert both.curve[128] == pytest.approx(0.5) and both.curve[64] == pytest.approx(0.5 * 0.75)
    narrow = guidanceschedule.shaped(Schedule(0.5, 1.0), "limited interval", sampling)
    assert narrow.start_percent == 0.5 and narrow.end_percent == pytest.approx(0.928, abs=1e-3)


def test_low_equal_to_high_is_a_constant_cfg_whatever_the_sampler_says(model):
    assert torch.equal(toy.sample(steered(model, 3.0, 3.0), cfg=9.0), toy.sample(model, cfg=3.0))


def test_low_one_everywhere_runs_no_negative(model):
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, 1.0, 1.0), cfg=9.0, steps=4)
    assert (count.calls, count.rows) == (4, 4)
    assert torch.equal(out, toy.sample(model, cfg=1.0, steps=4))


def test_the_samplers_cfg_comes_back(model):
    guider = comfy.samplers.CFGGuider(steered(model))
    guider.set_conds(toy.POSITIVE, toy.NEGATIVE)
    guider.set_cfg(4.25)
    toy.sample(model, guider=guider)
    assert guider.cfg == 4.25


def test_what_is_added_stays_where_the_cfg_is_one(model):
    """Peers return the positive outside the interval and lose what others added."""
    both = pag.apply(steered(model, schedule=Schedule(0.9, 1.0)), 3.0, "auto", ALWAYS)
    first = toy.sample(both, steps=1)
    assert torch.equal(first, toy.sample(pag.apply(model, 3.0, "auto", ALWAYS), cfg=1.0, steps=1))


@pytest.mark.parametrize("windows", [(ALWAYS, ALWAYS), (Schedule(0.0, 0.4), Schedule(0.5, 1.0))])
def test_two_raise_since_each_sets_every_step(model, windows):
    twice = steered(steered(model, schedule=windows[0]), 2.0, schedule=windows[1])
    with pytest.raises(ValueError, match="SteerGuidanceSchedule: the model carries it twice.*keep one"):
        toy.sample(twice)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((float("nan"), 7.5, "custom"), "low nan"),
        ((1.0, float("inf"), "custom"), "high inf"),
        ((-1.0, 7.5, "custom"), "low -1.0"),
        ((1.0, 7.5, "linear"), 'preset "linear" must be one of custom, limited interval'),
    ],
)
def test_bad_input_raises_in_the_node(model, arguments, text):
    with pytest.raises(ValueError, match=f"SteerGuidanceSchedule: {text}"):
        guidanceschedule.apply(model, *arguments, ALWAYS)


def test_needs_a_negative(model):
    guider = Guider_Basic(steered(model))
    guider.set_conds(toy.POSITIVE)
    with pytest.raises(ValueError, match="SteerGuidanceSchedule: needs a negative conditioning.*use KSampler"):
        toy.sample(model, guider=guider)


def test_a_window_no_step_falls_into_still_sets_low_and_says_nothing_wrong(model, caplog):
    narrow = steered(model, 3.0, 9.0, schedule=Schedule(0.0101, 0.0102))
    with caplog.at_level(logging.WARNING):
        out = toy.sample(narrow, cfg=9.0)
    assert torch.equal(out, toy.sample(model, cfg=3.0))
    assert "no effect" not in caplog.text


def test_the_report_counts_the_rows_that_are_saved(model):
    text = report.describe(steered(model, schedule=Schedule(0.2, 0.8)))
    assert "sets the cfg of each step: SteerGuidanceSchedule (low 1.0, high 7.5) from 20% to 80%" in text
    assert "0% to 20%: 1 rows in 1 call (positive)" in text
    assert "20% to 80%: 2 rows in 1 call (positive, negative)" in text
