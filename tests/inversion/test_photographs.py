"""Pictures as people have them: of any size, with transparency, grey, several at once. From Load Image to the edit."""

import folder_paths
import host
import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    return tmp_path


def photograph(path, width, height, mode="RGB", seed=0):
    """Soft light, a few things in it and grain. RGBA: the left third is transparent."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    light = 0.5 + 0.4 * np.stack([np.sin(3 * x + i + 2 * y) for i in range(3)], -1)
    for _ in range(4):
        cx, cy, r = rng.random(3) * (0.8, 0.8, 0.25)
        light[(x - cx) ** 2 + (y - cy) ** 2 < r**2] = rng.random(3)
    pixels = np.uint8(255 * (light + rng.normal(0, 0.02, light.shape)).clip(0, 1))
    image = Image.fromarray(pixels).convert(mode)
    if mode == "RGBA":
        alpha = np.full((height, width), 255, np.uint8)
        alpha[:, : width // 3] = 0
        image.putalpha(Image.fromarray(alpha))
    image.save(path)


def graph(name, keep=False, which="unet", more=None):
    """Load Image, VAE Encode, Invert; then Direct Inversion at cfg 4, under the prompt of the inversion.
    keep: Keep Region in its place, with the picture's transparency as the mask."""
    model = ["9", 0] if keep else ["8", 0]
    prompt = {
        "1": {"class_type": "SteerLabModel", "inputs": {"model": which}},
        "2": {"class_type": "LoadImage", "inputs": {"image": name}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a plain blue background"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "6": {"class_type": "SteerInvert", "inputs": {
            "model": ["1", 0], "positive": ["4", 0], "latent": ["3", 0], "method": "ddim / euler", "steps": 4,
            "scheduler": "normal", "denoise": 1.0, "iterations": 1}},
        "8": {"class_type": "SteerDirectInversion", "inputs": {
            "model": ["1", 0], "trajectory": ["6", 1], "offset": 1.0, "start_percent": 0.0, "end_percent": 1.0}},
        "10": {"class_type": "CFGGuider", "inputs": {
            "model": model, "positive": ["4", 0], "negative": ["5", 0], "cfg": 4.0}},
        "11": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "12": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["6", 2], "guider": ["10", 0], "sampler": ["11", 0], "sigmas": ["6", 3],
            "latent_image": ["3", 0]}},
        "13": {"class_type": "VAEDecode", "inputs": {"samples": ["12", 0], "vae": ["1", 2]}},
    }
    if keep:
        prompt["9"] = {"class_type": "SteerKeepRegion", "inputs": {
            "model": ["1", 0], "mask": ["2", 1], "trajectory": ["6", 1], "grow": 0, "feather": 0,
            "start_percent": 0.0, "end_percent": 1.0}}
    return prompt | (more or {})


@pytest.mark.parametrize("which", ["unet", "dit"])
@pytest.mark.parametrize(
    "width, height, mode",
    [(131, 97, "RGB"), (128, 128, "RGBA"), (96, 160, "L"), (72, 56, "1"), (400, 24, "RGB"), (16, 16, "P")],
)
def test_it_comes_back(run_prompt, folder, width, height, mode, which):
    """As the host cuts it, to whole cells of 8 pixels; at any cfg under its own prompt."""
    photograph(folder / "a.png", width, height, mode)
    result = run_prompt(graph("a.png", which=which))
    source, out = result["3"][0]["samples"], result["12"][0]["samples"]
    assert source.shape == (1, 4, height // 8, width // 8)
    assert (out - source).abs().max() < 2e-3 * source.abs().max()
    assert result["13"][0].shape == (1, height // 8 * 8, width // 8 * 8, 3)


@pytest.mark.parametrize("width, height", [(128, 128), (131, 97), (200, 48)])
def test_transparency_is_a_mask(run_prompt, folder, width, height):
    """What was transparent may change, the rest comes out bit for bit."""
    photograph(folder / "a.png", width, height, "RGBA")
    result = run_prompt(graph("a.png", keep=True))
    source, out = result["3"][0]["samples"], result["12"][0]["samples"]
    edge = -(-(width // 3) * (width // 8) // width) + 1
    assert torch.equal(out[..., edge:], source[..., edge:]) and out.isfinite().all()
    assert (out - source)[..., : edge - 1].abs().mean() > 0.01


def test_a_picture_without_transparency_has_no_mask(run_prompt, folder):
    """The host gives an empty one of 64x64 then, whatever the picture's size."""
    photograph(folder / "a.png", 131, 97)
    with pytest.raises(host.PromptError, match="SteerKeepRegion: the mask is empty"):
        run_prompt(graph("a.png", keep=True))


def test_the_mask_of_another_picture_is_refused(run_prompt, folder):
    photograph(folder / "a.png", 128, 96)
    photograph(folder / "b.png", 96, 128, "RGBA")
    prompt = graph("a.png", keep=True, more={"14": {"class_type": "LoadImage", "inputs": {"image": "b.png"}}})
    prompt["9"]["inputs"]["mask"] = ["14", 1]
    with pytest.raises(host.PromptError, match="SteerKeepRegion: .*another aspect than the picture: 96x128"):
        run_prompt(prompt)


def test_several_at_once_are_each_their_own(run_prompt, folder):
    for seed, name in enumerate("ab"):
        photograph(folder / f"{name}.png", 88, 64, "RGBA", seed)
    second = {
        "20": {"class_type": "LoadImage", "inputs": {"image": "b.png"}},
        "21": {"class_type": "ImageBatch", "inputs": {"image1": ["2", 0], "image2": ["20", 0]}},
    }
    prompt = graph("a.png", keep=True, more=second)
    prompt["3"]["inputs"]["pixels"] = ["21", 0]
    both = run_prompt(prompt)["12"][0]["samples"]
    for i, name in enumerate("ab"):
        alone = run_prompt(graph(f"{name}.png", keep=True))["12"][0]["samples"]
        torch.testing.assert_close(both[i : i + 1], alone, rtol=2e-2, atol=2e-2)


def test_a_mask_from_prompts_has_the_pictures_size(run_prompt, folder):
    photograph(folder / "a.png", 131, 97)
    found = {"15": {"class_type": "SteerDiffEditMask", "inputs": {
        "model": ["1", 0], "source": ["4", 0], "target": ["5", 0], "latent": ["3", 0], "seed": 0, "maps": 2,
        "strength": 0.5, "threshold": 0.5, "blur": 0.0, "grow": 0}}}
    prompt = graph("a.png", keep=True, more=found)
    prompt["9"]["inputs"]["mask"] = ["15", 0]
    result = run_prompt(prompt)
    assert result["15"][0].shape == result["13"][0].shape[:3] == (1, 96, 128)


def test_less_than_a_cell_is_no_picture(run_prompt, folder):
    """VAE Encode cuts to whole cells, here to nothing; it says so itself, before anything of ours runs."""
    photograph(folder / "a.png", 7, 40)
    with pytest.raises(host.PromptError, match="VAEEncode") as error:
        run_prompt(graph("a.png"))
    assert error.value.faults[0][0] == "3"
