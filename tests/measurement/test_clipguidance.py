"""The angle between what is seen and what is read, its slope, cutouts, the projection of texts, what does not fit."""

from functools import cache

import comfy.sd
import comfy.supported_models_base
import pytest
import torch
import toy
from comfy import sdxl_clip
from measurement.by_hand import SMALL, made, once, scales
from measurement.test_measurement import picture, vae
from steer.models.lab.load import TEXT, load_clip, load_vision
from steer.patches.measurement import clipguidance
from steer.patches.shared.energy import push
from steer.patches.shared.schedule import Schedule

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)


@cache
def encoders():
    with torch.inference_mode():  # as the host's loaders make them
        return load_clip(), load_vision()


@pytest.fixture(params=["unet", "flux"])
def model(request):
    return made(request.param)


def steered(model, strength=0.3, schedule=ALWAYS, cutouts=0, text="a happy person", seed=0, **more):
    how = push(strength, **more)
    return clipguidance.apply(model, vae(), *encoders(), text, how, schedule, cutouts, seed)


def term_of(model):
    return model.model_options["steer"][-1]


def test_the_loss_is_the_angle(model):
    """2 arcsin(|u - v| / 2)^2 is half the square of the angle between two vectors of length 1."""
    term, (clip, eye) = term_of(steered(model)), encoders()
    pictures = picture(1, 2, 128).movedim(-1, 1)
    with torch.inference_mode():
        ours = term.judge(pictures)
        seen = eye.encode_image(pictures.movedim(1, -1)).image_embeds.float()
        read = clipguidance.pooled(clip, "a happy person").float()
    angle = torch.cosine_similarity(seen, read).arccos()
    assert torch.allclose(ours, angle.square() / 2, rtol=0.02)


@pytest.mark.parametrize("form", ["estimate", "network"])
def test_each_step_turns_towards_the_text(model, form):
    D, ours = once(model), steered(model, 0.05, gradient=form)
    moved, (s, a) = once(ours), scales(model)

    def loss(D):
        with torch.inference_mode():
            return float(term_of(ours).judge(term_of(ours).decoder(model.model.process_latent_out(D))))

    assert loss(moved) < loss(D)
    length = 0.05 * s / (a**2 + s**2) ** 0.5 * float(D.std())
    assert float((moved - D).square().mean().sqrt()) == pytest.approx(length, rel=1e-2)


def test_cutouts_are_parts_and_the_same_every_time(model):
    pictures = picture(1, 1, 128).movedim(-1, 1)
    first, again, other = (
        list(term_of(steered(model, cutouts=5, seed=seed)).parts(pictures)) for seed in (0, 0, 1)
    )
    assert len(first) == 5 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [p.shape for p in first] != [p.shape for p in other]
    assert all(p.shape[-1] == p.shape[-2] and 51 <= p.shape[-1] <= 128 for p in first)
    (whole,) = term_of(steered(model)).parts(pictures)
    assert torch.equal(whole, pictures)
    assert once(steered(model, cutouts=2)).isfinite().all()


def test_off_is_no_node_and_a_batch_is_its_runs(model):
    start = toy.noise(batch=2, **SMALL)
    plain = toy.sample(model, steps=2, start=start)
    for off in (dict(strength=0.0), dict(schedule=NEVER)):
        assert torch.equal(toy.sample(steered(model, **off), steps=2, start=start), plain)
    out = once(steered(model), start=start)
    for i in range(2):
        alone = once(steered(model), start=start[i : i + 1])
        near = (out[i : i + 1] - alone).abs() < 5e-3 * alone.abs().max()
        assert float(near.float().mean()) > 0.97  # kinks of the decoder's ReLUs move single values


def test_the_text_is_projected_once():
    """The host leaves the projection out for SD1.x and Flux, and applies it for SDXL's refiner."""
    clip = encoders()[0]
    plain = clip.encode_from_tokens(clip.tokenize("a happy person"), return_pooled=True)[1]
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    assert torch.allclose(clipguidance.pooled(clip, "a happy person"), plain @ weight.float().T, atol=1e-4)
    target = comfy.supported_models_base.ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLRefinerClipModel)
    small = {"clip_g_model_config": {**TEXT, "num_hidden_layers": 3, "hidden_act": "gelu"}}
    refiner = comfy.sd.CLIP(target, tokenizer_data={}, model_options=small)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in refiner.cond_stage_model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    said = refiner.encode_from_tokens(refiner.tokenize("a happy person"), return_pooled=True)[1]
    before = refiner.encode_from_tokens(refiner.tokenize("a happy person"), return_pooled="unprojected")[1]
    assert torch.equal(clipguidance.pooled(refiner, "a happy person"), said) and not torch.allclose(said, before)


def test_a_text_encoder_without_projection_is_refused(model):
    clip = load_clip()
    clip.cond_stage_model.clip_l.transformer.text_projection.weight.data.zero_()
    with pytest.raises(ValueError, match="SteerCLIPGuidance: the text encoder has no projection, .* with Load CLIP"):
        clipguidance.apply(model, vae(), clip, encoders()[1], "a person", push(), ALWAYS)


def test_bad_input_raises_before_sampling(model):
    clip, eye = encoders()
    from steer.models.lab.load import VISION, vision_model

    narrow = vision_model({**VISION, "projection_dim": 64})
    with pytest.raises(ValueError, match="SteerCLIPGuidance: text and pictures have no space in common: .* 128 .* 64;"):
        clipguidance.apply(model, vae(), clip, narrow, "a person", push(), ALWAYS)
    for options, words in (
        (dict(strength=-1.0), "strength -1.0 must be"),
        (dict(cutouts=-1), "cutouts -1 must be a finite number from 0 to 256"),
    ):
        with pytest.raises(ValueError, match=f"SteerCLIPGuidance: {words}"):
            steered(model, **options)
    with pytest.raises(ValueError, match="SteerCLIPGuidance: the VAE is of another model"):
        once(steered(model), start=toy.noise(channels=16, **SMALL))


def test_on_the_lab_the_text_shows_which_the_prompt_leaves_out():
    """Told by the reader, which neither looks nor reads in the guidance."""
    from bench.lab_measurement import guided_by_clip, lab

    of = lab("unet", 4, 9000)
    off, on = (guided_by_clip(of, 8, options) for options in (None, dict(strength=1.0, gradient="network")))
    assert float(on["found"].mean()) > float(off["found"].mean()) + 0.4
    assert float(on["cosine"].mean()) > float(off["cosine"].mean()) + 0.05
