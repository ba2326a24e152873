import logging

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras import nodes_context_windows
from comfy_extras.nodes_custom_sampler import Guider_Basic
from steer.patches.guidance import adaptiveguidance, apg, cfgpp, guidanceschedule, negative, pag
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
STEPS = 8


@pytest.fixture(scope="module")
def model():
    return toy.model()


def steered(model, threshold, schedule=ALWAYS):
    return adaptiveguidance.apply(model, threshold, schedule)


def cosine(a, b):
    return float((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()))


class Watch:
    """The host's own CFG, item by item: cosines of every evaluation, and the negative left out from `threshold` on."""

    def __init__(self, model, threshold=2.0, cfg=5.0):
        self.model, self.threshold, self.cfg = model, threshold, cfg
        self.gammas, self.spared = [], 0

    def guider(self):
        watch = self
        flow = isinstance(self.model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
        done = set()

        class Guider(comfy.samplers.CFGGuider):
            def predict_noise(self, x, timestep, model_options=None, seed=None):
                conds = [self.conds["positive"], self.conds["negative"]]
                D_c, D_u = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
                s, out, gammas = float(timestep[0]), [], []
                for i in range(len(x)):
                    watch.spared += i in done
                    out.append(D_c[i] if i in done else D_u[i] + watch.cfg * (D_c[i] - D_u[i]))
                    v_c, v_u = ((x - D)[i] if flow else (x - D)[i] / s - D[i] for D in (D_c, D_u))
                    gammas.append(cosine(v_c, v_u))
                for i, gamma in enumerate(gammas):
                    if gamma >= watch.threshold:
                        done.add(i)
                watch.gammas.append(gammas)
                return torch.stack(out)

        guider = Guider(self.model)
        guider.set_conds(toy.POSITIVE, toy.NEGATIVE)
        return guider

    def sample(self, **options):
        return toy.sample(self.model, guider=self.guider(), **options)


def between(model, batch=2, **options):
    """A threshold that one item reaches well before the other, from the cosines of the run without it."""
    watch = Watch(model)
    watch.sample(start=toy.noise(batch=batch), steps=STEPS, **options)
    peaks = [[max(g[i] for g in watch.gammas[: k + 1]) for i in range(batch)] for k in range(len(watch.gammas) - 2)]
    return sum(max(peaks, key=lambda pair: max(pair) - min(pair))) / batch


def near(a, b, share=2e-5):
    return (a - b).abs().max() <= share * b.abs().max()


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_equals_the_loop_item_by_item(kind, sampler):
    """The paper's rule, written out: a cosine per item, the negative dropped for good once it is reached."""
    model = toy.model(kind=kind)
    threshold, start = between(model, sampler=sampler), toy.noise(batch=2)
    watch = Watch(model, threshold)
    theirs = watch.sample(start=start, steps=STEPS, sampler=sampler)
    assert 0 < watch.spared < 2 * len(watch.gammas) - 2
    ours = toy.sample(steered(model, threshold), start=start, steps=STEPS, sampler=sampler)
    assert near(ours, theirs, 1e-4)
    assert not near(ours, toy.sample(model, start=start, steps=STEPS, sampler=sampler), 1e-2)


def test_all_switched_runs_one_row_per_item(model):
    """Reached at once by every item: one guided evaluation, then the positive alone."""
    with toy.count_forwards(model) as count:
        toy.sample(steered(model, -1.0), steps=STEPS, start=toy.noise(batch=2))
    assert (count.calls, count.rows) == (STEPS, 4 + 2 * (STEPS - 1))


def test_a_switched_item_pays_for_no_blocks(model, caplog):
    """While its batch mate goes on, its negative row meets the embedding and the last layer, and no block between."""
    threshold = between(model)
    watch = Watch(model, threshold)
    watch.sample(start=toy.noise(batch=2), steps=STEPS)
    seen = []
    block = model.model.diffusion_model.middle_block[1]
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    try:
        with caplog.at_level(logging.INFO), toy.count_forwards(model) as count:
            toy.sample(steered(model, threshold), steps=STEPS, start=toy.noise(batch=2))
    finally:
        handle.remove()
    assert count.calls == STEPS
    assert sum(seen) == 4 * STEPS - watch.spared
    assert f"{watch.spared} negatives spared" in caplog.text


@pytest.mark.parametrize("how", ["joined", "separate calls", "area", "controlnet"])
def test_an_item_alone_is_the_item_in_a_batch(model, how, monkeypatch):
    """One image of the batch decides for itself, however the host lays out the rows."""
    positive, threshold = toy.POSITIVE, between(model)
    if how == "separate calls":
        monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    elif how == "area":
        positive = toy.text(1) + toy.text(3, area=(8, 8, 4, 2), strength=0.8)
    elif how == "controlnet":
        control = toy.controlnet(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)), 0.3)
        positive = toy.text(1, control=control, control_apply_to_uncond=True)
    ours = steered(model, threshold)
    both = toy.sample(ours, steps=STEPS, start=toy.noise(batch=2), positive=positive)
    for i in range(2):
        alone = toy.sample(ours, steps=STEPS, start=toy.noise(seed=i), positive=positive)
        assert near(both[i : i + 1], alone, 1e-4)


def test_where_the_host_runs_the_conds_in_its_own_way_the_result_is_the_same(model):
    """Context windows over the items of a batch: no row is left out, but a switched item is unguided all the same."""
    ours, start = steered(model, between(model)), toy.noise(batch=2)
    windows = nodes_context_windows.ContextWindowsManualNode.execute(
        ours, 2, 1, "standard_uniform", 1, False, "flat", 0, False
    ).result[0]
    assert near(toy.sample(windows, start=start, steps=STEPS), toy.sample(ours, start=start, steps=STEPS), 1e-4)


def test_a_run_starts_with_guidance_again(model):
    """Peers keep the switch on the guider: a later run at lower noise begins without guidance."""
    ours = steered(model, -1.0)
    first = toy.sample(ours, steps=STEPS)
    low = toy.sigmas(model, STEPS)[4:]
    with toy.count_forwards(model) as count:
        toy.sample(ours, sigmas=low)
    assert count.rows == 2 + (len(low) - 2)
    assert torch.equal(toy.sample(ours, steps=STEPS), first)


@pytest.mark.parametrize("needy", ["CFG++", "SteerNegative"])
def test_no_switch_while_another_term_needs_the_negative(model, needy):
    def add(m):
        if needy == "CFG++":
            return cfgpp.apply(m, 0.6, ALWAYS)
        return negative.apply(m, toy.text(11), 1.0, ALWAYS)

    assert torch.equal(toy.sample(steered(add(model), -1.0), steps=4), toy.sample(add(model), steps=4))


def test_other_terms_go_on_after_the_switch(model):
    ours = pag.apply(apg.apply(steered(model, -1.0), 0.0, 15.0, -0.5, ALWAYS), 3.0, "auto", ALWAYS)
    with toy.count_forwards(model) as count:
        out = toy.sample(ours, steps=STEPS)
    assert out.isfinite().all() and (count.calls, count.rows) == (STEPS, 3 + 2 * (STEPS - 1))


def test_it_has_the_last_word_over_a_schedule(model):
    both = guidanceschedule.apply(steered(model, -1.0), 3.0, 9.0, "custom", ALWAYS)
    with toy.count_forwards(model) as count:
        toy.sample(both, steps=STEPS)
    assert count.rows == STEPS + 1


def test_acts_in_its_window_only(model):
    with toy.count_forwards(model) as count:
        toy.sample(steered(model, -1.0, Schedule(0.5, 1.0)), steps=STEPS)
    sampling = model.get_model_object("model_sampling")
    before = sum(float(s) > float(sampling.percent_to_sigma(0.5)) for s in toy.sigmas(model, STEPS)[:-1])
    assert count.rows == STEPS + before + 1


def test_equal_prompts_switch_at_once_without_nan(model):
    with toy.count_forwards(model) as count:
        out = toy.sample(steered(model, 0.991), steps=4, negative=toy.POSITIVE)
    assert out.isfinite().all() and count.rows == 5


def test_needs_a_negative(model):
    guider = Guider_Basic(steered(model, 0.9))
    guider.set_conds(toy.POSITIVE)
    with pytest.raises(ValueError, match="SteerAdaptiveGuidance: needs a negative conditioning.*use KSampler"):
        toy.sample(model, guider=guider)


@pytest.mark.parametrize("threshold", [float("nan"), 1.5, -2.0])
def test_bad_threshold_raises_in_the_node(model, threshold):
    with pytest.raises(ValueError, match=f"SteerAdaptiveGuidance: threshold {threshold} must be .* from -1 to 1"):
        steered(model, threshold)
