import pytest
import torch
import toy
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from steer.patches.hspace import direction
from steer.patches.shared.hspace import block, probe

STEPS = 3


def empty(batch=2, size=16):
    return {"samples": torch.zeros(batch, 4, size, size)}


def pictures(seed, batch=2, size=16):
    return {"samples": toy.noise(seed, batch, size, size)}


def of_prompts(model, positive=toy.POSITIVE, negative=toy.NEGATIVE, latent=None, cfg=1.0, **options):
    noise, sigmas = Noise_RandomNoise(3), toy.sigmas(model, STEPS)
    with torch.inference_mode():
        return direction.of_prompts(model, positive, negative, noise, latent or empty(), sigmas, cfg, **options)


def of_pictures(model, latent, other=None, **options):
    with torch.inference_mode():
        return direction.of_pictures(
            model, toy.POSITIVE, Noise_RandomNoise(3), latent, other, toy.sigmas(model, STEPS), **options
        )


def oracle(model, samples, conditioning, sigmas, noise):
    """h at each sigma, read by the host's own patch while its Euler sampler runs, [steps, C, H, W]."""
    kept, clone = [], model.clone()

    def keep(h, hsp, options):
        if options["block"] == ("output", 0):
            kept.append(h.float().mean(0))
        return h, hsp

    clone.set_model_output_block_patch(keep)
    toy.sample(clone, 1.0, positive=conditioning, sigmas=sigmas, start=noise, latent=samples)
    return torch.stack(kept)


def test_of_prompts_is_the_mean_difference_on_the_samplers_own_path():
    model = toy.model()
    found = of_prompts(model)
    noise = Noise_RandomNoise(3).generate_noise(empty())
    a, b = (oracle(model, empty()["samples"], c, toy.sigmas(model, STEPS), noise) for c in (toy.POSITIVE, toy.NEGATIVE))
    assert found.dh.shape == a.shape == (STEPS, 128, 8, 8) and found.layer == ("middle", 0)
    assert torch.allclose(found.dh, a - b, atol=1e-4 * float(a.abs().max()))
    back = of_prompts(model, toy.NEGATIVE, toy.POSITIVE)
    assert torch.allclose(back.dh, -found.dh, atol=1e-4)
    assert not torch.allclose(of_prompts(model, cfg=4.0).dh, found.dh, atol=1e-2)


def test_of_pictures_compares_them_under_equal_noise():
    model = toy.model()
    found = of_pictures(model, pictures(1), pictures(20))
    noise = Noise_RandomNoise(3).generate_noise(empty())
    sigma = toy.sigmas(model, STEPS)[1]
    means = []
    for latent in (pictures(1), pictures(20)):
        x = model.model.process_latent_in(latent["samples"]) + sigma * noise
        with torch.inference_mode():
            ((h, _),) = probe(model, toy.POSITIVE, [(x, sigma)], block(model, "middle"))
        means.append(h.mean(0))
    assert torch.allclose(found.dh[1], means[0] - means[1], atol=1e-5)
    assert torch.allclose(found.at(float(sigma)), found.dh[1])
    between = found.at(float(sigma + toy.sigmas(model, STEPS)[2]) / 2)
    assert torch.allclose(between, (found.dh[1] + found.dh[2]) / 2, atol=1e-4)
    assert torch.equal(found.at(1e4), found.dh[0]) and torch.equal(found.at(0.0), found.dh[-1])


def test_principal_directions_are_those_of_the_svd():
    """In order of their deviation, orthogonal, and each item is the mean plus its scores."""
    h = toy.noise(1, 5).unsqueeze(1) * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)
    found = [direction.principal(h, k).flatten() for k in (1, 2, 3, 4)]
    _, s, V = torch.linalg.svd((h - h.mean(0)).flatten(1), full_matrices=False)
    for k, v in enumerate(found):
        assert torch.allclose(v.norm(), s[k] / 2, rtol=1e-4)
        assert torch.allclose((v @ V[k]).abs() / v.norm(), torch.tensor(1.0), atol=1e-4)
    assert abs(float(found[0] @ found[1])) < 1e-3 * float(found[0].norm() * found[1].norm())


def test_principal_directions_of_pictures():
    model = toy.model()
    one, two = (of_pictures(model, pictures(1, 4), component=k) for k in (1, 2))
    assert one.dh.norm() > two.dh.norm() > 0
    with pytest.raises(ValueError, match="SteerHSpaceDirection: there is no principal direction 4 of 4 pictures"):
        of_pictures(model, pictures(1, 4), component=4)
    with pytest.raises(ValueError, match="SteerHSpaceDirection: there is no principal direction 1 of 1 pictures"):
        of_pictures(model, pictures(1, 1))


def test_the_model_is_not_changed_and_the_same_comes_out_twice():
    model = toy.model()
    before = toy.sample(model)
    assert torch.equal(of_prompts(model).dh, of_prompts(model).dh)
    assert torch.equal(toy.sample(model), before)


def test_bad_input():
    model = toy.model()
    with pytest.raises(ValueError, match="SteerHSpaceDirection: both kinds of pictures have the same features"):
        of_prompts(model, toy.POSITIVE, toy.POSITIVE)
    with pytest.raises(ValueError, match="SteerHSpaceDirection: the pictures differ in size"):
        of_pictures(model, pictures(1), pictures(2, size=24))
    with pytest.raises(ValueError, match='SteerHSpaceDirection: layer "output" names 3 blocks; name one'):
        of_prompts(model, layer="output")
    with pytest.raises(ValueError, match="SteerHSpaceDirection: works in the h-space of a UNet"):
        of_prompts(toy.flux())
    with pytest.raises(ValueError, match="SteerHSpaceDirection: cfg nan"):
        of_prompts(model, cfg=float("nan"))
