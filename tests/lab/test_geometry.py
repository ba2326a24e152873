"""The judge of faces learns to read latents, and asks for the face of the portrait where it is told to judge."""

import numpy as np
import pytest
import torch
from steer.models.lab import common, data, edit, evaluate, geometry, latents, load, portrait


def test_learns_resumes_and_is_found(tmp_path, monkeypatch, work):
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    first = geometry.Geometry(work)
    portraits = geometry.portraits(10)
    everyone, z = torch.ones(10, dtype=torch.bool), first.z * 2
    wide = load.LabLatent(load.latent_stats("unet"), 2 * load.LATENT_STD)
    for seconds in (4, 8, 16, 32):  # of processors, of which some do ten times the steps of others
        geometry.train(work, seconds, batch=10)
        faces = geometry.Faces(work, portraits, wide)
        right = faces.error(z, list(range(10)), everyone)
        wrong = faces.error(z.roll(2, 0), list(range(10)), everyone)
        if right < 0.4 * wrong:
            break
    again = geometry.Geometry(work)
    assert again.step > first.step > 0
    assert right < 0.4 * wrong
    assert faces.error(z, list(range(10)), ~everyone) == 0
    with common.autocast():
        read = faces.judge(again.eyes(again.z))[1]  # halving and doubling are exact
    assert torch.equal(right, (read - again.measures).square().mean())


def test_learns_from_others_than_it_judges(work):
    drawn = geometry.portraits(10)
    assert [p for n in range(edit.PAIRS) for p in data.edit(n)[:2] if p in drawn] == []
    made = np.load(work / "faces.npy")
    assert made.shape == (10, 4, 16, 16) and made.dtype == np.float16
    wanted = latents.encode(evaluate.taesd(), portrait.draw(drawn[7])[None])[0]
    assert np.abs(made[7] - wanted).max() < 0.02 * np.abs(wanted).max()


def test_sees_the_picture_that_is_decoded():
    """Its eyes and the layers that it leaves out make the picture of the VAE."""
    latent_format, z = load.LabLatent(load.latent_stats("dit"), 1.0), torch.randn(2, 4, 16, 16)
    vae = evaluate.taesd()
    with torch.no_grad():
        seen = geometry.eyes(latent_format)(z)
        rest = torch.nn.Sequential(*list(vae.taesd_decoder)[geometry.LAYERS :])
        assert seen.shape == (2, 64, 32, 32)
        assert torch.allclose(2 * rest(seen) - 1, vae.decode(latent_format.process_out(z)), atol=1e-4)


def test_a_slope_comes_only_from_what_is_judged(work):
    faces = geometry.Faces(work, [data.edit(0)[0]] * 4, load.LabLatent(load.latent_stats("unet")))
    z = torch.randn(4, 4, 16, 16, requires_grad=True)
    judged = torch.tensor([True, False, True, False])
    (slope,) = torch.autograd.grad(faces.error(z, [0, 1, 2, 3], judged), z)
    assert [bool(each.any()) for each in slope] == judged.tolist()


def test_says_which_stage_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage geometry before"):
        geometry.Faces(tmp_path, [], None)
