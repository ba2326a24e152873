import pytest
import toy
from steer.patches.shared.architectures import adapter_of
from steer.patches.shared.layers import Layer, listing, resolve

AVAILABLE = tuple(
    Layer(group, i) for group, ids in (("input", (4, 5, 7)), ("middle", (0,)), ("output", (3, 4, 5, 6))) for i in ids
)


@pytest.mark.parametrize(
    "text, names",
    [
        ("middle", "middle"),
        ("output.3-5", "output.3-5"),
        ("output.6, input.4", "input.4, output.6"),
        ("input", "input.4-5, input.7"),
        ("middle,middle", "middle"),
        ("0%-25%", "input.4-5"),
        ("50%-100%", "output.3-6"),
        ("37.5%-50%", "middle"),
        ("0%", "input.4"),
        ("50%", "output.3"),
        ("40%, 99%", "middle, output.6"),
    ],
)
def test_names(text, names):
    assert listing(resolve(text, AVAILABLE)) == names


@pytest.mark.parametrize("text", ["output.9", "double.3", "input.6", "middle, output.40-50", "99%-99.5%", "100%"])
def test_no_match_says_what_exists(text):
    with pytest.raises(ValueError, match="this model has input.4-5, input.7, middle, output.3-6"):
        resolve(text, AVAILABLE)


@pytest.mark.parametrize("text", ["", "out put", "output.", "output.3-", "5", "middle,"])
def test_unreadable_says_how_to_write(text):
    with pytest.raises(ValueError, match='write for example "middle", "output.3-5"'):
        resolve(text, AVAILABLE)


def test_unet_layers_are_those_with_attention():
    network = toy.model().model.diffusion_model
    found = tuple(dict.fromkeys(b.layer for b in adapter_of(toy.model().model).blocks(network) if b.attends))
    assert listing(found) == "input.1, input.3, middle, output.0-3"


def test_sd15_layers(monkeypatch):
    import torch

    with torch.device("meta"):
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        network = UNetModel(**toy.SD15, num_heads=8, device="meta", dtype=torch.float16)
    from steer.patches.shared.architectures import unet

    found = tuple(dict.fromkeys(block.layer for block in unet.blocks(network) if block.attends))
    assert listing(found) == "input.1-2, input.4-5, input.7-8, middle, output.3-11"


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"cannot act on Gaussian \(GaussianNetwork\); supported: UNet"):
        adapter_of(toy.gaussian().model)
