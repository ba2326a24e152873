"""Every stage of the training runs, resumes and leaves nothing untrained; on 100 portraits and for seconds."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from steer.models.lab import captions, common, data, dit, edit, latents, load, portrait, unet, vae, vision

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder with 100 portraits, an autoencoder trained for a moment and its latents; the log goes there too."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "WEIGHTS", folder)
        data.build(folder, 100)
        vae.train(folder, budget=2, batch=2)
        latents.build(folder)
        yield folder


def test_latents_are_whitened(work):
    stats = latents.moments(work)
    z = np.load(work / "latents.npy").astype(np.float32)
    assert np.allclose(z.mean((0, 2, 3)), stats["mean"], atol=1e-3)
    assert np.allclose(z.std((0, 2, 3)), stats["std"], atol=1e-3)
    base = unet.network(stats)
    assert abs(base.latent_format.process_in(torch.from_numpy(z)).std() - 0.4) < 0.01
    back = base.latent_format.process_out(base.latent_format.process_in(torch.from_numpy(z)))
    assert torch.allclose(back, torch.from_numpy(z), atol=1e-4)


def test_unet_trains_every_part_and_resumes(work, clock):
    unet.train(work, budget=4, batch=2)
    first = torch.load(work / "unet.ckpt", weights_only=True)
    assert first["step"] > 3
    assert [name for name, w in first["model"].items() if name.startswith("unet.") and not w.any()] == []
    unet.train(work, budget=7, batch=2)
    again = torch.load(work / "unet.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 7


def test_dit_trains_every_part_and_resumes(work, clock):
    unet.train(work, budget=1, batch=2)
    dit.train(work, budget=4, batch=4)
    first = torch.load(work / "dit.ckpt", weights_only=True)
    assert first["step"] > 3
    assert [name for name, w in first["model"].items() if not w.any()] == []
    dit.train(work, budget=6, batch=4)
    again = torch.load(work / "dit.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 6


def test_edit_trains_encoder_and_middle_resumes_and_exports(work, clock):
    edit.build(work, 7)
    pairs = np.load(work / "edits.npy")
    assert pairs.shape == (7, 2, 4, 16, 16) and np.ptp(pairs, axis=(2, 3, 4)).all()
    edit.build(work, 7)  # what is there stays
    assert np.array_equal(np.load(work / "edits.npy"), pairs)
    edit.train(work, budget=4, batch=4)
    first = torch.load(work / "unet-edit.ckpt", weights_only=True)
    assert first["step"] > 3
    edit.train(work, budget=6, batch=4)
    again = torch.load(work / "unet-edit.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 6
    exported, shipped = load_file(work / "unet_edit.safetensors"), load_file(load.WEIGHTS / "unet.safetensors")
    assert {name.split(".")[0] for name in exported} == set(edit.TRAINED)
    assert exported.pop("input_blocks.0.0.weight")[:, 4:].any()  # the image's channels, zero before
    assert [name for name, w in exported.items() if torch.equal(w, shipped[name])] == []


def test_vision_trains_every_part_resumes_and_exports(work, monkeypatch, clock):
    begun = {k: v.clone() for k, v in vision.Vision(work).model.state_dict().items()}
    vision.train(work, budget=3, batch=16)
    first = torch.load(work / "vision.ckpt", weights_only=True)
    assert first["step"] > 3
    assert [name for name, w in first["model"].items() if torch.equal(w, begun[name])] == []
    vision.train(work, budget=4, batch=16)
    again = torch.load(work / "vision.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 4
    exported = load_file(work / "vision.safetensors")
    assert {f"vision.{name}" for name in exported} == {name for name in again["model"] if name.startswith("vision.")}
    (work / "vision.ckpt").unlink()
    anew = vision.Vision(work, lr=0.5)
    anew.load(work)
    assert anew.lr == 0.25
    for name, weight in anew.model["vision"].state_dict().items():
        assert torch.equal(weight.half(), exported[name]), name
    assert anew.loss(16)[1]["distance"] < 1e-6  # from what was shipped
    with torch.no_grad():
        anew.model["vision"].visual_projection.weight.mul_(1.5)
    batch = anew.batch(16)
    found = vision.states(anew.model["vision"], batch[0])
    embedding = found[0] / 1.5
    wanted = (embedding / 2).square().mean() / embedding.var(0).mean() / 6  # the five hidden states are where they were
    assert torch.isclose(anew.distance(found, batch[0]), wanted, rtol=1e-3)
    monkeypatch.setattr(anew, "batch", lambda size: batch)
    near = anew.loss(16)[0]
    monkeypatch.setattr(vision, "NEAR", vision.NEAR + 100)
    assert torch.isclose(anew.loss(16)[0] - near, 100 * wanted, rtol=1e-2)


def test_an_edit_is_told_by_what_changed():
    rng = random.Random(0)
    for seed in range(50):
        source, edited, name = data.edit(seed)
        assert [n for n in portrait.FACTORS if getattr(source, n) != getattr(edited, n)] == [name]
        assert source.geometry == edited.geometry
        said = captions.parse(", ".join(edit.instruction(edited, name, rng)))
        assert said[name] == getattr(edited, name)
        assert all(getattr(edited, n) == value for n, value in said.items())


def test_times_cover_the_flow_and_dwell_in_its_middle():
    t = dit.times(4000, "cpu")
    assert 0 < t.min() < 0.03 and 0.97 < t.max() < 1
    assert 0.2 < (t - 0.5).abs().mean() < 0.25


def test_vae_resumes(work):
    first = torch.load(work / "vae.ckpt", weights_only=True)
    vae.train(work, budget=first["seconds"] + 2, batch=2)
    assert torch.load(work / "vae.ckpt", weights_only=True)["step"] > first["step"]


def test_the_command_explains_itself():
    command = [sys.executable, str(ROOT / "models" / "lab" / "train.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for stage in ("data", "vae", "latents", "text", "reader", "unet", "dit", "export", "edit", "vision", "adapter",
                  "faceid", "time", "eval"):
        assert stage in text


@pytest.mark.parametrize("able, fast", [("amx_bf16", True), ("bf16", True), ("avx512_bf16", False), ("avx2", False)])
def test_bf16_is_fast_where_matrices_have_units_for_it(monkeypatch, able, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    monkeypatch.setattr(common, "device", lambda: torch.device("cpu"))
    assert common.fast_bf16.__wrapped__() is fast


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_used_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(common, "fast_bf16", lambda: fast)
    with common.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
    near = common.orthogonalise(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)))
    assert near.dtype == torch.float32 and torch.allclose(near.mT @ near, torch.eye(5), atol=0.5)
