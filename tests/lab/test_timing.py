"""The lab's time predictors learn, and tell the noise of portraits that no stage has seen."""

import numpy as np
import pytest
import torch
from steer.models.lab import common, load, timing
from steer.models.measurement import timepredictor
from steer.patches.shared.euler import signal


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_learns_resumes_and_exports(tmp_path, monkeypatch, work, which):
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    (tmp_path / "edits.npy").symlink_to(work / "edits.npy")
    timing.train(tmp_path, 1, batch=64, which=which)
    first = timing.Timing(tmp_path, which)
    noisy, level = first.noise.drawn(first.z.repeat(40, 1, 1, 1), seed=1)
    for seconds in (4, 8, 16, 32):  # of processors, of which some do ten times the steps of others
        timing.train(tmp_path, seconds, batch=64, which=which)
        exported = timepredictor.load(tmp_path / load.TIMES[which])
        told = exported(noisy)
        if timing.gaps(told, level).mean() < 200:
            break
    again = timing.Timing(tmp_path, which)
    assert again.step > first.step > 0
    assert (exported.kind, exported.channels) == ({"unet": "eps", "dit": "flow"}[which], 4)
    again.model.load_state_dict(again.average.shadow)
    with torch.no_grad():
        assert torch.allclose(told, again.model(noisy).log_softmax(1), rtol=0.02, atol=0.1)  # fp16
    assert timing.gaps(told, level).mean() < 200  # a guess without a look: 333


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_noise_is_of_its_level(which, work):
    noise = timing.Noise(which)
    z = torch.from_numpy(np.load(work / "edits.npy")).float().flatten(0, 1).repeat(26, 1, 1, 1)
    noisy, level = noise.drawn(z, seed=0)
    assert level.unique().tolist() == list(range(timing.LEVELS)) and bool((noise.levels().diff() > 0).all())
    sigma = noise.levels()[level].view(-1, 1, 1, 1)
    x = noisy if which == "dit" else noisy * (1 + sigma**2).sqrt()
    n = (x - signal(noise.sampling, sigma) * noise.base.latent_format.process_in(z)) / sigma
    kept = level > timing.LEVELS // 4  # where half a level is little of the noise
    assert n[kept].std() == pytest.approx(1, abs=0.03) and n[kept].mean().abs() < 0.02


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_the_shipped_ones_tell_unseen_portraits(which):
    file = load.WEIGHTS / load.TIMES[which]
    assert file.stat().st_size < 2**20
    found = timing.score(which, 128)
    assert found["gap"] < {"unet": 60, "dit": 25}[which]
    assert max(found["quarter 1"], found["quarter 2"]) < 20
