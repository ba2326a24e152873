"""The measuring instrument itself. The card has 1000 portraits; here fewer, so the thresholds leave room."""

import pytest
import torch
from steer.models.lab import data, evaluate, vae
from steer.models.lab.portrait import FACTORS, Portrait, draw


@pytest.fixture(scope="module")
def report(reader):
    return evaluate.reader_report(reader, 150)


@pytest.mark.parametrize("seen", ["renders", "reconstructions"])
def test_reads_every_factor(report, seen):
    assert min(report[seen]["accuracy"].values()) >= 0.95


@pytest.mark.parametrize("seen", ["renders", "reconstructions"])
def test_tells_faces_apart(report, seen):
    assert report[seen]["identity_auc"] >= 0.98
    assert min(report[seen]["geometry_r2"]) > 0.6


def test_identity_ignores_what_is_worn(reader):
    one = Portrait.from_seed(3, hat="no hat", glasses="no glasses")
    looks = [one, Portrait.from_seed(3, hat="crown", glasses="glasses", hair_color="green", skin="dark")]
    faces = reader(torch.cat([evaluate.tensor(draw(p)[None]) for p in looks]))[2]
    other = reader(evaluate.tensor(draw(Portrait.from_seed(4, hat="no hat", glasses="no glasses"))[None]))[2]
    assert torch.allclose(faces.norm(dim=1), torch.ones(2), atol=1e-5)
    assert faces[0] @ faces[1] > faces[0] @ other[0] + 0.3


def test_score_prefers_the_right_prompt_and_has_a_gradient(reader):
    image = evaluate.tensor(draw(Portrait(hair_color="blue"))[None]).requires_grad_()
    right, wrong = reader.score(image, "blue hair"), reader.score(image, "red hair")
    assert right > wrong + 2
    assert torch.autograd.grad(wrong.sum(), image)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="names no factor"):
        reader.score(image, "a castle")


def test_read_names_values(reader):
    p = Portrait.from_seed(8)
    row = reader.read(evaluate.tensor(draw(p)[None]))[0]
    assert {name: value for name, (value, _) in row.items()} == {name: getattr(p, name) for name in FACTORS}


def test_vae_reconstructs():
    mean, low = vae.psnr(evaluate.taesd(), data.held_out(24, 7000)[1])
    assert mean >= 28
    assert low >= 22
