"""The papers' claims on the lab's trained model: orderings and effect sizes, far from the figures' spread.

tests/bench/lab_guidance.md has the figures for more prompts, seeds and settings.
"""

from functools import cache

import pytest
import torch
import toy
from bench.lab_guidance import lab, measure, text, unconditional, without
from steer.models.lab.evaluate import sample
from steer.patches.guidance import apg, betacfg, cfgpp, feedbackcfg, negative, pag, seg, slg, tag
from steer.patches.shared.architectures import adapter_of
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
FEW = dict(prompts=24, seeds=1, steps=16)
METHODS = {
    "CFG": lambda m: m,
    "PAG": lambda m: pag.apply(m, 3.0, "auto", ALWAYS),
    "APG": lambda m: apg.apply(m, 0.0, 0.75, -0.5, ALWAYS),
    "CFG++": lambda m: cfgpp.apply(m, 0.6, ALWAYS),
}


@cache
def figures(method, cfg):
    return measure(METHODS[method], cfg=cfg, **FEW)


def test_apg_rescues_a_high_cfg():
    """Cfg 14 is far from the truth; APG at the same cfg is nearer, by 1.7 to 2.0 dB on four seeds, and no less obedient
    (0.004 to 0.030 more hits). Colour is not claimed: APG clips more here (0.008 to 0.012 against 0.003 to 0.005)."""
    moderate, burnt, rescued = figures("CFG", 3.0), figures("CFG", 14.0), figures("APG", 14.0)
    assert burnt["PSNR"] < moderate["PSNR"] - 2.0
    assert rescued["PSNR"] > burnt["PSNR"] + 1.0
    assert rescued["hits"] > burnt["hits"] - 0.02


def test_weak_branches_make_unguided_samples_more_real():
    """The papers' own figure, on Lab-DiT without prompt and CFG: the Frechet distance falls. At 8 steps it was 215 of
    192 samples without, 202 with PAG, 192 with SEG and 189 with SLG at 0.5, and in both halves of the samples; at the
    6 steps and 72 samples of here, 334, 328, 315 and 320."""
    count = dict(count=72, which="dit", steps=6)
    off = unconditional(**count)
    for steer in (
        lambda m: pag.apply(m, 0.5, "single.1", ALWAYS),
        lambda m: seg.apply(m, 0.5, 100.0, "single.1", ALWAYS),
        lambda m: slg.apply(m, 0.5, "single.1", ALWAYS),
    ):
        assert unconditional(steer, **count) < off - 2.0


def test_a_negative_takes_away_what_it_names():
    """Half of the portraits wear glasses where the prompt says nothing of them."""
    named = lambda m: negative.apply(m, text("glasses"), 2.0, ALWAYS)  # noqa: E731
    options = dict(prompts=16, seeds=1, cfg=3.0)
    assert without("glasses", named, **options) < without("glasses", **options) - 0.2


def test_cfgpp_beats_cfg_at_the_papers_pair():
    """The paper sets lambda 0.6 beside cfg 7.5: as obedient (within 0.004), and 2.2 to 2.6 dB closer on four seeds."""
    plain, ours = figures("CFG", 7.5), figures("CFG++", 7.5)
    assert ours["hits"] > plain["hits"] - 0.02
    assert ours["PSNR"] > plain["PSNR"] + 1.0


@pytest.mark.parametrize(
    "cfg, steer, gain",
    [
        (1.0, lambda m: tag.apply(m, 0.2, ALWAYS), 0.1),
        (4.0, lambda m: betacfg.apply(m, 2.0, 2.0, 0.0, False, ALWAYS), 0.01),
        (7.5, lambda m: feedbackcfg.apply(m, 1.0, 7.5, 8, 0.5, ALWAYS), 0.15),
    ],
    ids=["TAG", "beta-CFG", "feedback"],
)
def test_a_model_that_obeys_badly_obeys_better(cfg, steer, gain):
    """The reader's mean log-probability of the prompt on the little trained Lab-DiT. At 10 steps over four seeds: TAG
    -1.42 to -1.30, beta-CFG -1.12 to -1.04, feedback -1.23 to -1.02; here -1.48 to -1.29, -1.10 to -1.06, -1.30 to
    -1.01, and each finds 0.01 to 0.03 more of the prompt."""
    options = dict(prompts=16, seeds=2, which="dit-weak", steps=6, cfg=cfg)
    plain, steered = measure(**options), measure(steer, **options)
    assert steered["fit"] > plain["fit"] + gain
    assert steered["hits"] > plain["hits"]


def test_cfgpp_paths_are_smoother():
    """Fig. 3 of the paper: the clean estimate moves less from step to step."""

    def path(cfg, steer):
        model, clip, _ = lab()[0]
        texts = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a flat portrait, a crown", ""))
        seen = []
        toy.sample(
            steer(model),
            cfg=cfg,
            steps=20,
            start=toy.noise(batch=8),
            sampler=cfgpp.sampler("euler", 1.0, 1.0) if steer is METHODS["CFG++"] else "euler",
            callback=lambda step, x0, x, total: seen.append(x0),
            **dict(zip(("positive", "negative"), texts, strict=True)),
        )
        return float(sum((b - a).abs().mean() for a, b in zip(seen, seen[1:], strict=False)))

    assert path(7.5, METHODS["CFG++"]) < 0.8 * path(7.5, METHODS["CFG"])


@pytest.mark.parametrize("layer", ["input.1", "input.3", "middle", "output.0", "output.1", "output.2", "output.3"])
def test_every_attention_layer_of_the_lab_can_be_perturbed(layer):
    models = lab()[0]
    blocks = adapter_of(models[0].model).blocks(models[0].model.diffusion_model)
    assert layer in {str(block.layer) for block in blocks if block.attends}
    prompts = ["a comic portrait of a happy person, glasses", "a flat portrait, a top hat"]
    plain = sample(models, prompts, 0, steps=6, cfg=2.0)
    perturbed = sample((pag.apply(models[0], 3.0, layer, ALWAYS), *models[1:]), prompts, 0, steps=6, cfg=2.0)
    assert (perturbed - plain).abs().mean() > 1e-3


def test_everything_together_still_draws_what_is_asked():
    def together(model):
        return METHODS["PAG"](METHODS["APG"](model))

    assert measure(together, cfg=5.0, **FEW)["hits"] > 0.85
    few = measure(together, cfg=5.0, prompts=2, seeds=1, steps=2)
    assert all(torch.as_tensor(figure).isfinite().all() for figure in few.values())
