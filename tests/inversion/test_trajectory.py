import json
from dataclasses import replace

import folder_paths
import host
import pytest
import torch
import toy
from safetensors.torch import load_file, safe_open, save_file
from steer.nodes.inversion.trajectory import LoadTrajectory
from steer.patches.inversion import directinversion
from steer.patches.inversion.invert import invert
from steer.patches.inversion.trajectory import SUFFIX, load, parts, save
from steer.patches.shared.schedule import Schedule

PICTURE = toy.noise(40) * 0.8


def inverted(model, conditioning=toy.POSITIVE):
    with torch.inference_mode():
        found = invert(model, toy.POSITIVE, PICTURE, toy.sigmas(model), "fixed-point", 2)
    return replace(found, conditioning=conditioning)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Input and output folders of the host's, empty."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "out"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "in"))
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    return tmp_path


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_there_and_back_bit_for_bit(tmp_path, kind):
    model = toy.model(kind=kind)
    conditioning = [
        *toy.text(1, area=("percentage", 0.5, 1.0, 0.0, 0.25), strength=1.5, mask=torch.rand(1, 8, 8) > 0.5, note="a"),
        *toy.text(2, nothing=None, reference_latents=[PICTURE.half(), PICTURE.bfloat16()], at=(1, [2.5, {}, True])),
    ]
    conditioning[1][0] = conditioning[0][0].mT.contiguous().mT  # neither contiguous nor of its own memory
    conditioning[0][1]["again"] = conditioning[0][0]
    found = inverted(model, conditioning)
    save(found, tmp_path / f"a{SUFFIX}")
    back = load(tmp_path / f"a{SUFFIX}")
    for name in ("sigmas", "latents", "conditioning", "method"):
        assert same(getattr(found, name), getattr(back, name)), name
    assert back.model == found.model and torch.equal(back.model.weights, found.model.weights)
    back.check(model, PICTURE.shape, toy.sigmas(model))
    assert [p.name for p in tmp_path.iterdir()] == [f"a{SUFFIX}"]


def test_editing_goes_on_from_a_file(tmp_path):
    model = toy.model()
    found = inverted(model)
    save(found, tmp_path / f"a{SUFFIX}")
    back = load(tmp_path / f"a{SUFFIX}")

    def edited(trajectory):
        source, noise, sigmas, positive = parts(model, trajectory)
        torch.testing.assert_close(source, PICTURE)
        steered = directinversion.apply(model, trajectory, 1.0, Schedule())
        start = noise.generate_noise({"samples": source})
        return toy.sample(steered, positive=toy.text(5), start=start, latent=source, sigmas=sigmas), positive

    (one, positive), (other, _) = edited(back), edited(found)
    assert torch.equal(one, other) and same(positive, toy.POSITIVE)


def test_what_no_file_can_hold_is_named(tmp_path):
    control = toy.controlnet(torch.rand(1, 3, 128, 128))
    found = inverted(toy.model(), toy.text(1, control=control, control_apply_to_uncond=True))
    with pytest.raises(ValueError, match=r"SteerSaveTrajectory: .* \(control: ControlNet\); invert with a prompt"):
        save(found, tmp_path / f"a{SUFFIX}")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_trajectory_are_refused_with_a_reason(tmp_path):
    path = tmp_path / f"a{SUFFIX}"

    def refused(words):
        with pytest.raises(ValueError, match=f"SteerLoadTrajectory: a{SUFFIX} .*{words}"):
            load(path)

    save(inverted(toy.model()), path)
    whole, tensors = path.read_bytes(), {key: t.clone() for key, t in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for part in (whole[: len(whole) // 2], whole[:100], whole[:5], b"", b"\x80\x04\x95 a pickle", b"<html>" * 50):
        path.write_bytes(part)
        refused("cannot be read as a whole safetensors file .* save it anew")
    save_file(tensors, path)
    refused("is not a trajectory; choose a file that SteerSaveTrajectory wrote")
    save_file(tensors, path, {**metadata, "version": "2"})
    refused("has format version '2', and this code reads 1; update Steer")
    for name in ("sigmas", "latents", "weights", "conditioning.0.0"):
        save_file({key: t for key, t in tensors.items() if key != name}, path, metadata)
        refused(f"is damaged .*{name}")
    save_file({**tensors, "sigmas": tensors["sigmas"][:2].clone()}, path, metadata)
    refused("is damaged .* 5 latents for 2 sigmas")
    told = json.loads(metadata["trajectory"])
    for broken in ("{", "[]", json.dumps({**told, "model": {}}), json.dumps({**told, "conditioning": {}})):
        save_file(tensors, path, {**metadata, "trajectory": broken})
        refused("is damaged")
    path.unlink()
    refused("cannot be read")


def graph(prefix="steer/a", file=("4", 0), kind="unet"):
    """Invert, save, load, and all of it back through the sampler."""
    factors = ("style", "expression", "position", "skin", "hair_style", "hair_color", "glasses", "hat", "shirt",
               "pattern", "background")
    return {
        "1": {"class_type": "SteerLabModel", "inputs": {"model": "unet"}},
        "2": {"class_type": "SteerLabPortrait", "inputs": {"seed": 3, **dict.fromkeys(factors, "from seed")}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ["2", 1]}},
        "6": {"class_type": "SteerInvert", "inputs": {
            "model": ["1", 0], "positive": ["5", 0], "latent": ["3", 0], "method": "fixed-point", "steps": 6,
            "scheduler": "normal", "denoise": 1.0, "iterations": 6}},
        "4": {"class_type": "SteerSaveTrajectory", "inputs": {"trajectory": ["6", 1], "filename_prefix": prefix}},
        "7": {"class_type": "SteerLoadTrajectory", "inputs": {"file": list(file) if len(file) == 2 else file}},
        "8": {"class_type": "SteerLabModel", "inputs": {"model": kind}},
        "9": {"class_type": "SteerTrajectoryParts", "inputs": {"model": ["8", 0], "trajectory": ["7", 0]}},
        "10": {"class_type": "BasicGuider", "inputs": {"model": ["8", 0], "conditioning": ["9", 3]}},
        "11": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "12": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["9", 1], "guider": ["10", 0], "sampler": ["11", 0], "sigmas": ["9", 2],
            "latent_image": ["9", 0]}},
        "13": {"class_type": "PreviewAny", "inputs": {"source": ["12", 0]}},
    }


def test_through_the_executor(run_prompt, folders):
    for number in (1, 2):
        result = run_prompt(graph())
        assert result["4"][0] == f"steer/a_{number:05}_{SUFFIX} [output]"
        assert result.ui["4"]["trajectories"] == [
            {"filename": f"a_{number:05}_{SUFFIX}", "subfolder": "steer", "type": "output"}
        ]
    assert same(result["7"][0].latents, result["6"][1].latents)
    source, returned = (result[n][0]["samples"] for n in ("3", "12"))
    assert (returned - source).abs().mean() < 0.05 * source.abs().mean()
    with pytest.raises(host.PromptError, match="SteerTrajectoryParts: the trajectory is of another model"):
        run_prompt(graph(kind="dit"))


def test_a_file_may_lie_in_either_folder_and_nowhere_else(run_prompt, folders):
    run_prompt(graph())
    saved = folders / "out" / "steer" / f"a_00001_{SUFFIX}"
    (folders / "in" / f"mine{SUFFIX}").write_bytes(saved.read_bytes())
    (folders / "in" / "other.safetensors").write_bytes(saved.read_bytes())
    (folders / f"secret{SUFFIX}").write_bytes(saved.read_bytes())
    mine, theirs = f"mine{SUFFIX}", f"steer/a_00001_{SUFFIX} [output]"
    (file,) = LoadTrajectory.define_schema().inputs
    assert file.options == [mine, theirs]
    for name in (mine, theirs):
        result = run_prompt({"7": graph(file=name)["7"]})
        assert result["7"][0].method == "fixed-point"
    for name in ("other.safetensors", f"../secret{SUFFIX}", str(folders / f"secret{SUFFIX}"), f"gone{SUFFIX}"):
        with pytest.raises(host.PromptError, match="there is no trajectory") as error:
            run_prompt({"7": graph(file=name)["7"]})
        assert error.value.before_start
    before = LoadTrajectory.fingerprint_inputs(mine)
    assert LoadTrajectory.fingerprint_inputs(theirs) == before
    (folders / "in" / mine).write_bytes(b"another")
    assert LoadTrajectory.fingerprint_inputs(mine) != before
    with pytest.raises(host.PromptError, match="cannot be read as a whole safetensors file"):
        run_prompt({"7": graph(file=mine)["7"]})
