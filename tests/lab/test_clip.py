"""The lab's texts and pictures have one space: the text nearest to a portrait says what it shows."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from steer.models.lab import clip, load
from steer.patches.measurement import clipguidance


def test_every_text_that_fits_is_right():
    """With one right answer each it is the cross-entropy; a portrait that fits too is no mistake."""
    u, v = (F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(n)), dim=-1) for n in (1, 2))
    logits, own = 3.0 * u @ v.T, torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert torch.allclose(clip.loss(2.0 * u, v, torch.eye(5), 3.0), expected)
    both = torch.eye(5)
    both[0, 1] = 1.0
    row = -(torch.log_softmax(logits, 1)[0, :2]).mean()
    column = -(torch.log_softmax(logits.T, 1)[1, :2]).mean()
    changed = clip.loss(u, v, both, 3.0) - expected
    assert torch.allclose(changed * 10, row - F.cross_entropy(logits[:1], own[:1])
                          + column - F.cross_entropy(logits.T[1:2], own[1:2]), atol=1e-5)


def test_is_trained_and_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(clip.common, "WEIGHTS", tmp_path)  # of the log
    clip.train(tmp_path, portraits=300, steps=40)
    weight = load_file(tmp_path / "clip.safetensors")["text_projection.weight"].float()
    monkeypatch.undo()
    people, _ = clip.data.held_out(100, 70_000)
    names = {"style", "glasses", "expression"}
    v, t = clip.seen(people), clip.read([clip.phrases(p, names) for p in people])
    fits = torch.tensor([[all(getattr(a, n) == getattr(b, n) for n in names) for b in people] for a in people]).float()
    before, after = (clip.loss(t @ w.T, v, fits, 10.0) for w in (torch.eye(128), weight))
    assert after < before - 0.5


def test_the_nearest_text_says_what_a_portrait_shows():
    found = clip.zero_shot(200)
    assert sum(found.values()) / len(found) > 0.8 and min(found.values()) > 0.55


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_the_pooled_text_is_projected_for_clip_guidance_alone(which):
    encoder, weight = load.load_clip(which), load_file(load.WEIGHTS / "clip.safetensors")["text_projection.weight"]
    text = "a flat portrait of a happy person, red hair"
    plain = clip.read([text.split(", ")])
    pooled = encoder.encode_from_tokens(encoder.tokenize(text), return_pooled=True)[1].float().cpu()
    assert torch.allclose(pooled, plain, atol=2e-3 * plain.abs().max().item())
    projected, expected = clipguidance.pooled(encoder, text).cpu(), plain @ weight.float().T
    assert torch.allclose(projected, expected, atol=2e-3 * expected.abs().max().item())
