"""The judge of faces learns to read latents, and asks for the face of the portrait where it is told to judge."""

import numpy as np
import pytest
import torch
from steer.models.lab import common, data, edit, evaluate, geometry, latents, portrait


def test_learns_resumes_and_is_found(tmp_path, monkeypatch, work):
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    first = geometry.Geometry(work)
    portraits = geometry.portraits(10)
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


def test_learns_from_others_than_it_judges(work):
    drawn = geometry.portraits(10)
    assert [p for n in range(edit.PAIRS) for p in data.edit(n)[:2] if p in drawn] == []
    made = np.load(work / "faces.npy")
    assert made.shape == (10, 4, 16, 16) and made.dtype == np.float16
    wanted = latents.encode(evaluate.taesd(), portrait.draw(drawn[7])[None])[0]
    assert np.abs(made[7] - wanted).max() < 0.02 * np.abs(wanted).max()


def test_looks_at_faces_up_and_down(work, monkeypatch):
    """A face is moved by whole latents, its measures are not; every move occurs."""
    stage, seen = geometry.Geometry(work), []
    monkeypatch.setattr(geometry, "NOISE", 0)
    stage.model.register_forward_pre_hook(lambda model, given: seen.append(given[0]))
    for _ in range(60):
        stage.loss(1)
    places = [[(n, by) for n, z in enumerate(stage.z) for by in range(-4, 5) if torch.equal(z.roll(by, 1), x[0])]
              for x in seen]
    assert {len(found) for found in places} == {1}
    assert {by for ((_, by),) in places} == set(range(-geometry.SHIFT, geometry.SHIFT + 1))


def test_a_slope_comes_only_from_what_is_judged(work):
    faces = geometry.Faces(work, [data.edit(0)[0]] * 4, 1.0)
    z = torch.randn(4, 4, 16, 16, requires_grad=True)
    judged = torch.tensor([True, False, True, False])
    (slope,) = torch.autograd.grad(faces.error(z, [0, 1, 2, 3], judged), z)
    assert [bool(each.any()) for each in slope] == judged.tolist()


def test_says_which_stage_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage geometry before"):
        geometry.Faces(tmp_path, [], 1.0)
