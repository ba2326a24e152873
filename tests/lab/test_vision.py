"""The lab's image encoder is the host's CLIP_VISION, and carries what the portraits show."""

import comfy.clip_vision
import numpy as np
import pytest
import torch
from comfy.clip_model import CLIPVisionModelProjection
from safetensors.torch import load_file
from steer.models.lab import data, likeness, load, vision
from steer.nodes.lab.vision import LabVision

from nodes import CLIPVisionEncode

LEAST = {"embedding": (0.97, 0.86), "hidden states": (0.94, 0.72)}  # factors, R2 of the face

@pytest.fixture(scope="module")
def encoder():
    return load.load_vision()


def portraits(n, first=30_000):
    return torch.from_numpy(data.held_out(n, first)[1]).float() / 255


def test_it_is_the_hosts_clip_vision(encoder):
    assert type(encoder) is comfy.clip_vision.ClipVisionModel
    assert type(encoder.model) is CLIPVisionModelProjection
    assert encoder.image_size == 128
    node = LabVision.execute().args[0]
    shipped = load_file(load.WEIGHTS / "vision.safetensors")
    for name, weight in node.model.state_dict().items():
        assert torch.equal(weight.float(), shipped[name].float()), name


def test_the_hosts_node_encodes_with_it(encoder):
    out = CLIPVisionEncode().encode(encoder, portraits(3), "center")[0]
    assert out.image_embeds.shape == (3, 128)
    assert out.penultimate_hidden_states.shape == (3, 17, 192)
    wide = torch.nn.functional.interpolate(portraits(3).movedim(-1, 1), scale_factor=2).movedim(1, -1)
    larger = encoder.encode_image(wide)
    assert torch.cosine_similarity(out.image_embeds, larger.image_embeds).min() > 0.9


def test_training_sees_what_the_host_sees(encoder):
    """`look` is the host's forward, written so that gradients pass."""
    model = vision.network()
    model.load_state_dict({k: w.float() for k, w in encoder.model.state_dict().items()})
    images = portraits(2)
    before, embedding = vision.look(model, images)
    out = encoder.encode_image(images)
    assert torch.allclose(before, out.penultimate_hidden_states, atol=2e-3)
    assert torch.allclose(embedding, out.image_embeds, atol=2e-3)
    embedding.sum().backward()
    assert model.vision_model.embeddings.patch_embedding.weight.grad.any()


def test_principal_components_carry_the_pictures():
    """The patch embedding's beginning: most of what the patches hold comes back from it, of unseen portraits too."""
    torch.manual_seed(0)
    model = vision.network()
    vision.principal(model, portraits(200))
    x = model.vision_model.embeddings(vision.clip_preprocess(portraits(40, 31_000), size=128))[:, 1:]
    raw = portraits(40, 31_000).unflatten(2, (4, 32)).unflatten(1, (4, 32)).transpose(2, 3).flatten(1, 2).flatten(2)
    a, b = (t.double().detach() - t.double().detach().mean(0) for t in (x, raw))
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    left = b - a @ torch.linalg.lstsq(a, b).solution
    assert left.square().sum() < 0.2 * b.square().sum()


def test_it_carries_factors_and_face(encoder):
    """Read off by a linear map; the card has the figures of more portraits."""
    found = likeness.probe(encoder, 400, 200)
    for name, least in LEAST.items():
        assert found[name][0] > least[0] and found[name][1] > least[1], (name, found)


def test_same_things_are_near():
    """A portrait is nearer to itself with one thing changed than to another person."""
    encoder = load.load_vision()
    pairs = [data.edit(data.HELD_OUT + 40_000 + n)[:2] for n in range(40)]
    one, other = (torch.from_numpy(np.stack([vision.draw(p[i]) for p in pairs])).float() / 255 for i in (0, 1))
    a, b = (torch.nn.functional.normalize(encoder.encode_image(x).image_embeds, dim=1) for x in (one, other))
    cosines = a @ b.T
    assert (cosines.argmax(1) == torch.arange(40)).float().mean() > 0.8
