from functools import cache

import comfy.model_base
import comfy.samplers
import pytest
import torch
import toy
from bench.lab_guidance import edit as lab_edit
from comfy_extras import nodes_custom_sampler
from steer.patches.guidance import instructpix2pix
from steer.patches.shared.schedule import Schedule

ALWAYS = Schedule()
IMAGE = toy.noise(20)
CONCAT, REFERENCE = {"concat_latent_image": IMAGE}, {"reference_latents": [IMAGE]}


def editor(kind="eps"):
    """The host's InstructPix2Pix class: four channels of noise, four of the image."""
    config = {**toy.UNET, "in_channels": 8, "num_heads": -1, "num_head_channels": 32}
    return toy.model(config, kind, base=comfy.model_base.SD15_instructpix2pix)


@pytest.fixture(scope="module")
def model():
    return editor()


def steered(model, s_I=1.5, schedule=ALWAYS):
    return instructpix2pix.apply(model, s_I, schedule)


def oracle(model, s_T, s_I, image, blind, **options):
    """e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0)), each e in a host call of its own."""

    class Three(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            e = {
                name: comfy.samplers.calc_cond_batch(self.inner_model, [conds], x, timestep, model_options)[0]
                for name, conds in self.conds.items()
            }
            return e["00"] + s_I * (e["I0"] - e["00"]) + s_T * (e["IT"] - e["I0"])

    guider = Three(model)
    conds = {"IT": toy.text(1, **image), "I0": toy.text(2, **image), "00": toy.text(2, **blind)}
    guider.inner_set_conds(conds)
    return toy.sample(model, guider=guider, **options)


def edit(model, image=CONCAT, **options):
    return toy.sample(model, positive=toy.text(1, **image), negative=toy.text(2, **image), **options)


def near(a, b, share=2e-5):
    return (a - b).abs().max() <= share * b.abs().max()


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("s_T, s_I", [(7.5, 1.5), (3.0, 0.5), (1.0, 2.0)])
def test_is_the_papers_three_terms(kind, s_T, s_I):
    model, start = editor(kind), toy.noise(batch=2)
    ours = edit(steered(model, s_I), cfg=s_T, start=start)
    zeros = {"concat_latent_image": torch.zeros_like(IMAGE)}
    assert near(ours, oracle(model, s_T, s_I, CONCAT, zeros, start=start), 1e-4)
    assert not near(ours, edit(model, cfg=s_T, start=start), 1e-2)


def test_reference_latents_are_taken_away():
    model = toy.flux()
    ours = edit(steered(model), REFERENCE, cfg=4.0)
    assert near(ours, oracle(model, 4.0, 1.5, REFERENCE, {}), 1e-4)
    assert not near(ours, edit(model, REFERENCE, cfg=4.0), 1e-2)


def test_equals_the_hosts_dual_guider(model):
    """Core's regular style with text + image, image, none is the same sum; it runs no pre_cfg functions of others."""
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(toy.text(1, **CONCAT), toy.text(2, **CONCAT), toy.text(2))
    guider.set_cfg(7.5, 1.5)
    assert near(edit(steered(model), cfg=7.5), toy.sample(model, guider=guider), 1e-4)


def test_one_call_and_one_more_row(model):
    with toy.count_forwards(model) as count:
        edit(steered(model))
    assert (count.calls, count.rows) == (4, 12)
    with toy.count_forwards(model) as count:
        edit(steered(model, schedule=Schedule(0.0, 0.5)))
    assert 8 < count.rows < 12


def test_one_is_plain_cfg_and_free(model):
    for off in (steered(model, 1.0), steered(model, schedule=Schedule(0.5, 0.5))):
        with toy.count_forwards(model) as count:
            out = edit(off)
        assert count.rows == 8 and torch.equal(out, edit(model))


def test_batch_of_two_equals_two_runs(model):
    both = edit(steered(model), start=toy.noise(batch=2))
    for i in range(2):
        assert near(both[i : i + 1], edit(steered(model), start=toy.noise(seed=i)))


def test_the_conditionings_keep_their_image(model):
    negative = toy.text(2, **CONCAT)
    toy.sample(steered(model), positive=toy.text(1, **CONCAT), negative=negative)
    assert torch.equal(negative[0][1]["concat_latent_image"], toy.noise(20))


@pytest.mark.parametrize("missing", ["positive", "negative"])
def test_a_conditioning_without_image_raises_before_sampling(model, missing):
    conds = {"positive": toy.text(1, **CONCAT), "negative": toy.text(2, **CONCAT), missing: toy.text(3)}
    with toy.count_forwards(model) as count:
        with pytest.raises(ValueError, match=f"SteerInstructPix2Pix: the {missing} conditioning has no image; pass it"):
            toy.sample(steered(model), **conds)
    assert count.calls == 0


def test_without_a_negative_raises(model):
    guider = nodes_custom_sampler.Guider_Basic(steered(model))
    guider.set_conds(toy.text(1, **CONCAT))
    with pytest.raises(ValueError, match="SteerInstructPix2Pix: needs a negative conditioning.*use KSampler"):
        toy.sample(model, guider=guider)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_bad_scale_raises_in_the_node(model, scale):
    with pytest.raises(ValueError, match=f"SteerInstructPix2Pix: image_scale {scale}"):
        steered(model, scale)


def test_two_at_once_raise(model):
    with pytest.raises(ValueError, match="SteerInstructPix2Pix: the model carries it twice at the same time"):
        edit(steered(steered(model), 2.0))


@cache
def lab(cfg, image_scale):
    """Figures of 24 edits of drawn portraits by the lab's model, each told the one factor to change."""
    return lab_edit(lambda m: steered(m, image_scale), prompts=24, seeds=1, steps=8, cfg=cfg)


def test_more_text_makes_more_edits():
    """At image_scale 2, on four seeds: 0.46 to 0.63 of the edits show at cfg 1, all at cfg 5, and the rest is kept."""
    weak, strong = lab(1.0, 2.0), lab(5.0, 2.0)
    assert strong["edited"] > weak["edited"] + 0.2
    assert strong["kept"] > 0.9


def test_more_image_keeps_more_of_the_source():
    """At cfg 5, from image_scale 1 to 2, on four seeds: 0.4 to 0.8 dB closer to the drawn truth, and the cosine of the
    face with the truth's is 0.05 to 0.08 higher; every edit shows."""
    plain, ours = lab(5.0, 1.0), lab(5.0, 2.0)
    assert ours["PSNR"] > plain["PSNR"] + 0.15
    assert ours["identity"] > plain["identity"] + 0.02
    assert ours["edited"] > plain["edited"] - 0.1
