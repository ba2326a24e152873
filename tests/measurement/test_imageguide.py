"""Pulls towards a picture: the losses written out, what they leave alone, and that each step comes nearer."""

import pytest
import torch
import toy
from measurement.by_hand import SMALL, made, once, scales
from measurement.test_measurement import picture, vae
from steer.models.lab.load import vision_model
from steer.models.lab.reader import load_reader
from steer.nodes.lab.scorer import LabScorer
from steer.nodes.measurement.imageguide import ImageGuide
from steer.patches.measurement import imageguide
from steer.patches.shared.decode import decoder
from steer.patches.shared.energy import push
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.vision import vision

ALWAYS, NEVER = Schedule(), Schedule(0.0, 0.0)


@pytest.fixture(params=["unet", "flux"])
def model(request):
    return made(request.param)


def eyes():
    return LabScorer("a happy person", decoder(vae()), load_reader())


def steered(model, loss="L2", strength=0.3, schedule=ALWAYS, image=None, **more):
    image = picture(4) if image is None else image
    return imageguide.apply(model, vae(), image, loss, push(strength, **more), schedule, eyes())


def loss_of(ours, D):
    """The term's own loss of D, without a graph."""
    term = ours.model_options["steer"][-1]
    with torch.inference_mode():
        return float(term.judge(term.decoder(made("unet").model.process_latent_out(D))))


def test_colours_count_wherever_they_are():
    x = picture(1, 2).movedim(-1, 1)
    mixed = x.flatten(2)[..., torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))].view_as(x)
    assert float(imageguide.palette(x, mixed).max()) < 1e-10
    darker = imageguide.palette(x, x - 0.1)
    assert torch.allclose(darker, imageguide.palette(mixed, x - 0.1)) and float(darker.min()) > 1e-4
    assert torch.allclose(darker[1:], imageguide.palette(x[1:], x[1:] - 0.1))
    grey = torch.full_like(x, 0.5)  # the transport between two single colours is their distance along each way
    ways = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    ways = ways / ways.norm(dim=1, keepdim=True)
    away = torch.tensor([0.1, -0.2, 0.0])
    by_hand = (ways @ away).square().mean()
    assert torch.allclose(imageguide.palette(grey + away.view(1, 3, 1, 1), grey), by_hand.expand(2), atol=1e-6)


def test_pixels_are_the_mean_of_squares(model):
    ours, D = steered(model), once(model)
    x = ours.model_options["steer"][-1].decoder
    with torch.inference_mode():
        shown = x(model.model.process_latent_out(D))
    assert loss_of(ours, D) == pytest.approx(float((shown - picture(4).movedim(-1, 1)).square().mean()), rel=1e-4)


@pytest.mark.parametrize("form", ["estimate", "network"])
@pytest.mark.parametrize("loss", imageguide.LOSSES)
def test_each_comes_nearer_by_its_own_measure(model, loss, form):
    D = once(model)
    ours = steered(model, loss, 0.05, gradient=form)
    moved = once(ours)
    assert loss_of(ours, moved) < loss_of(ours, D)
    s, a = scales(model)
    length = 0.05 * s / (a**2 + s**2) ** 0.5 * float(D.std())
    assert float((moved - D).square().mean().sqrt()) == pytest.approx(length, rel=1e-2)


def test_through_a_clip_vision(model):
    config = dict(
        model_type="clip_vision_model", hidden_size=32, num_attention_heads=2, num_hidden_layers=2, patch_size=16,
        image_size=64, intermediate_size=64, hidden_act="gelu", num_channels=3, projection_dim=16,
    )
    with torch.inference_mode():
        clip = vision_model(config)
        toy.random_weights(clip.model)
    ours = imageguide.apply(model, vae(), picture(4), "perceptual", push(0.05), ALWAYS, vision(clip))
    assert loss_of(ours, once(ours)) < loss_of(ours, once(model))


def test_off_is_no_node_and_a_batch_is_its_runs(model):
    start, images = toy.noise(batch=2, **SMALL), picture(7, 2)
    plain = toy.sample(model, steps=2, start=start)
    for off in (dict(strength=0.0), dict(schedule=NEVER)):
        assert torch.equal(toy.sample(steered(model, **off), steps=2, start=start), plain)
    out = once(steered(model, image=images), start=start)
    for i in range(2):
        alone = once(steered(model, image=images[i : i + 1]), start=start[i : i + 1])
        near = (out[i : i + 1] - alone).abs() < 5e-3 * alone.abs().max()
        assert float(near.float().mean()) > 0.97  # kinks of the decoder's ReLUs move single values


def test_bad_input_raises_before_sampling(model):
    with toy.count_forwards(model) as count:
        for options, words in (
            (dict(loss="L1"), "loss 'L1' is unknown; choose one of L2, perceptual, palette"),
            (dict(strength=-1.0), "strength -1.0 must be"),
            (dict(image=picture(0, 3)), "there are 3 guides for a batch of 1"),
        ):
            with pytest.raises(ValueError, match=f"SteerImageGuide: .*{words}"):
                once(steered(model, **options))
        with pytest.raises(ValueError, match="SteerImageGuide: perceptual needs a network that looks"):
            ImageGuide.execute(model, vae(), picture(), "perceptual", 1.0, "estimate", "unit", 1, 1, 0.0, 0.9)
        with pytest.raises(ValueError, match="SteerImageGuide: the VAE is of another model: 4 channels, .* has 16"):
            once(steered(model), start=toy.noise(channels=16, **SMALL))
    assert count.calls == 0
