"""The path of a run: what the sampler passes, for every kind of it, and nothing else of the run changed."""

import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced
from steer.nodes.inversion.record import RecordTrajectory
from steer.patches.inversion import directinversion
from steer.patches.inversion.invert import InvertedNoise
from steer.patches.shared.schedule import Schedule

EMPTY = {"samples": torch.zeros(1, 4, 16, 16)}


def guider(model, positive=toy.POSITIVE, cfg=3.0):
    made = comfy.samplers.CFGGuider(model)
    made.set_conds(positive, toy.NEGATIVE)
    made.set_cfg(cfg)
    return made


def recorded(model, sampler="euler", steps=5, latent=EMPTY, **options):
    given = Noise_RandomNoise(3), guider(model, **options), comfy.samplers.sampler_object(sampler)
    with torch.inference_mode():
        return RecordTrajectory.execute(*given, toy.sigmas(model, steps), latent).result


def sampled(model, sampler="euler", steps=5, noise=None, latent=EMPTY, **options):
    noise = Noise_RandomNoise(3) if noise is None else noise
    given = noise, guider(model, **options), comfy.samplers.sampler_object(sampler)
    with torch.inference_mode():
        return SamplerCustomAdvanced.execute(*given, toy.sigmas(model, steps), latent).result[0]["samples"]


@pytest.fixture(scope="module", params=["unet", "flux"])
def model(request):
    return toy.model() if request.param == "unet" else toy.flux()


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "ddim"])
def test_the_run_is_the_host_s_and_its_path_begins_and_ends_with_it(model, sampler):
    latent, trajectory = recorded(model, sampler)
    assert torch.equal(latent["samples"], sampled(model, sampler))
    assert trajectory.latents.shape == (6, 1, 4, 16, 16)
    assert torch.equal(model.model.process_latent_out(trajectory.source), latent["samples"])
    start = Noise_RandomNoise(3).generate_noise(EMPTY)
    sampling, sigma = model.get_model_object("model_sampling"), trajectory.sigmas[0]
    full = float(sigma) > float(sampling.sigma_max) * (1 - 1e-5)
    assert torch.allclose(trajectory.latents[0], sampling.noise_scaling(sigma, start, EMPTY["samples"], full))


def test_every_latent_is_that_before_its_step(model):
    """The oracle walks the Euler steps itself, from the host's own callback."""
    seen = []
    start, euler = Noise_RandomNoise(3).generate_noise(EMPTY), comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        guider(model).sample(
            start, EMPTY["samples"], euler, toy.sigmas(model, 5), disable_pbar=True, seed=3,
            callback=lambda i, D, x, n: seen.append(x.clone()),
        )
    _, trajectory = recorded(model)
    assert torch.equal(trajectory.latents[:-1], torch.stack(seen))


def test_the_source_is_drawn_again_from_it(model):
    """At the cfg of the recording, the same prompt from the same noise is the source; direct inversion holds it at
    another cfg."""
    latent, trajectory = recorded(model)
    again = sampled(model, noise=InvertedNoise(trajectory, model), latent=latent)
    scale = latent["samples"].abs().max()
    assert float((again - latent["samples"]).abs().max() / scale) < 1e-4
    held = directinversion.apply(model, trajectory, 1.0, Schedule())
    assert float((sampled(held, cfg=8.0) - latent["samples"]).abs().max() / scale) < 1e-4


def test_the_prompt_is_kept(model):
    area = [[toy.POSITIVE[0][0], {**toy.POSITIVE[0][1], "area": (8, 16, 0, 0), "strength": 0.5}], *toy.text(8)]
    kept = recorded(model, positive=area)[1].conditioning
    assert [(context is given[0], options) for (context, options), given in zip(kept, area, strict=True)] == [
        (True, given[1]) for given in area
    ]


def test_a_picture_of_which_a_part_may_change(model):
    """What the network is shown is under the mask already, and the path leads back to the result."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    latent = {"samples": toy.noise(40), "noise_mask": mask}
    made, trajectory = recorded(model, latent=latent)
    assert torch.equal(made["samples"], sampled(model, latent=latent))
    kept = model.model.process_latent_in(latent["samples"])
    assert torch.allclose(trajectory.source[..., 8:], kept[..., 8:], atol=1e-5)
    assert not torch.allclose(trajectory.source[..., :8], kept[..., :8], atol=1e-1)


def test_bad_input(model):
    with pytest.raises(ValueError, match="SteerRecordTrajectory: the sampler does not ask the model at sigma"):
        recorded(model, "dpm_adaptive")
    short = guider(model), comfy.samplers.sampler_object("euler"), toy.sigmas(model, 5)[:3]
    with pytest.raises(ValueError, match="SteerRecordTrajectory: the sigmas end at"):
        RecordTrajectory.execute(Noise_RandomNoise(3), *short, EMPTY)
    bare = comfy.samplers.CFGGuider(model)
    with pytest.raises(ValueError, match="CFGGuider has no positive conditioning"):
        RecordTrajectory.execute(Noise_RandomNoise(3), bare, short[1], toy.sigmas(model, 5), EMPTY)
