"""The judge of faces learns to read latents, and asks for the face of the portrait where it is told to judge."""

import pytest
import torch
from steer.models.lab import common, data, geometry


def test_learns_resumes_and_is_found(tmp_path, monkeypatch, work):
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    first = geometry.Geometry(work)
    portraits = [p for n in range(5) for p in data.edit(n)[:2]]
    everyone, z = torch.ones(10, dtype=torch.bool), first.z * 0.5
    for seconds in (4, 8, 16, 32):  # of processors, of which some do ten times the steps of others
        geometry.train(work, seconds, batch=10)
        faces = geometry.Faces(work, portraits, 0.5)
        right = faces.error(z, list(range(10)), everyone)
        wrong = faces.error(z.roll(2, 0), list(range(10)), everyone)
        if right < 0.4 * wrong:
            break
    again = geometry.Geometry(work)
    assert again.step > first.step > 0
    assert right < 0.4 * wrong
    assert faces.error(z, list(range(10)), ~everyone) == 0
    with common.autocast():
        read = faces.judge(again.z)[1]  # halving and doubling are exact
    assert torch.equal(right, (read - again.measures).square().mean())


def test_a_slope_comes_only_from_what_is_judged(work):
    faces = geometry.Faces(work, [data.edit(0)[0]] * 4, 1.0)
    z = torch.randn(4, 4, 16, 16, requires_grad=True)
    judged = torch.tensor([True, False, True, False])
    (slope,) = torch.autograd.grad(faces.error(z, [0, 1, 2, 3], judged), z)
    assert [bool(each.any()) for each in slope] == judged.tolist()


def test_says_which_stage_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage geometry before"):
        geometry.Faces(tmp_path, [], 1.0)
