"""The lab's model for edits does what it is told, and is the host's InstructPix2Pix."""

import comfy.model_base
import comfy.sample
import pytest
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from steer.models.lab import evaluate
from steer.models.lab.load import load_model, load_unet
from steer.models.lab.portrait import FACTORS


@pytest.fixture(scope="module")
def models():
    return load_model("unet-edit")


def test_it_is_the_hosts_instructpix2pix_on_lab_unets_decoder(models):
    assert type(models[0].model) is comfy.model_base.SD15_instructpix2pix
    ours, plain = (m.model.diffusion_model.state_dict() for m in (models[0], load_unet("unet")))
    same = {name.split(".")[0] for name in ours if torch.equal(ours[name], plain[name])}
    assert same == {"time_embed", "output_blocks", "out"}
    assert ours["input_blocks.0.0.weight"].shape[1] == 8


def test_edits_are_made_and_the_rest_is_kept(models, reader):
    """24 edits, one noise; the figures of more are in the card."""
    found = evaluate.edits(reader, models, 24, 1, cfg=3.0)
    assert found["edited"] >= 0.75
    assert found["kept"] >= 0.9


def test_without_a_picture_it_draws_from_the_text(models, reader):
    rates, _ = evaluate.prompt_hits(reader, models, 16, 1, first=100)
    assert sum(rates.values()) / len(FACTORS) >= 0.8


def test_no_picture_is_a_picture_of_zeros(models):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["glasses", "a crown"]
    bare = evaluate.sample_noise(models, prompts, noise, steps=3)
    zeros = evaluate.sample_noise(models, prompts, noise, steps=3, image=torch.zeros_like(noise))
    assert torch.equal(bare, zeros)


def test_the_hosts_node_brings_the_picture(models):
    """As InstructPixToPixConditioning wires it: the latent as the VAE encodes it, and an empty one to sample from."""
    model, clip, vae = models
    pixels = torch.from_numpy(evaluate.data.held_out(1, 9000)[1]).float() / 255
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("blue hair", "")]
    positive, negative, latent = InstructPixToPixConditioning.execute(*conds, pixels, vae).result
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    run = dict(steps=4, cfg=3.0, sampler_name="euler", scheduler="normal", seed=0, disable_pbar=True)
    out = comfy.sample.sample(model, noise, positive=positive, negative=negative, latent_image=latent["samples"], **run)
    made = evaluate.sample(models, ["blue hair"], 3, steps=4, cfg=3.0, image=vae.encode(pixels))
    assert torch.allclose(vae.decode(out).movedim(-1, 1), made, atol=1e-4)


def test_the_patcher_can_be_made_again(models):
    make, arguments = models[0].cached_patcher_init
    again = make(*arguments, disable_dynamic=True).model.state_dict()
    for name, a in models[0].model.state_dict().items():
        assert torch.equal(a, again[name]), name
