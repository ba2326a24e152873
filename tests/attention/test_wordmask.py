"""Word masks against maps written out, their limits, and where the lab's portraits have the words."""

import numpy as np
import pytest
import torch
import toy
from attention.by_hand import near
from attention.texts import clip, conditioning, maps, network, noise, one_step, path, watched
from bench.lab_inversion_edit import case
from steer.models.lab.captions import caption
from steer.models.lab.portrait import draw_masks
from steer.patches.attention import wordmask
from steer.patches.guidance import pag
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import Trajectory
from steer.patches.shared.words import encode

PROMPT = "a (happy:1.3) person, long blue hair\nand a blue hat"
ALL = {"unet": "input, middle, output"}


def explicit(name, model, trajectory, words, level):
    """{number of places: maps [layers, B, places]} of one evaluation, the mean of the heads."""
    found, columns = {}, list(encode(clip(), PROMPT)[1].find(words))

    def look(kind, number, q, k, v, heads, text):
        if kind != "self":
            queries = q[:, text : text + 16] if name == "z-image" else q[:, text:]  # it fills up the image too
            a = maps(queries, k[:, :text] if text else k, heads)
            found.setdefault(a.shape[2], []).append(a[..., columns].sum(-1).mean(1))

    hooked = watched(name, model, look)
    toy.sample(hooked, 1.0, positive=trajectory.conditioning, negative=trajectory.conditioning,
               **one_step(trajectory, level))
    return {places: torch.stack(each) for places, each in found.items()}


@pytest.mark.parametrize("name, words", [
    ("unet", "blue hair, hat"), ("unet", "happy"), ("flux", "blue hair, hat"), ("sd3", "hair"), ("qwen", "hair"),
    ("lumina", "hair"), ("z-image", "hair"), ("wan", "hair"),
])
def test_is_the_mean_of_explicit_maps(name, words):
    """Over layers, heads and the noise levels in the window."""
    model = network(name)
    trajectory = path(name, model, PROMPT, batch=2)
    high, low = (float(model.get_model_object("model_sampling").percent_to_sigma(p)) for p in (0.1, 0.9))
    levels = [i for i, s in enumerate(trajectory.sigmas[:-1].tolist()) if low < s <= high]
    assert 1 < len(levels) < 4
    every = [explicit(name, model, trajectory, words, i) for i in levels]
    found, _ = wordmask.look(model, clip(), PROMPT, words, trajectory=trajectory, start=0.1, end=0.9)
    grids = sorted(every[0])
    expected = torch.cat([each[grids[0]] for each in every]).mean(0)  # "auto": the coarser of the UNet's two
    assert found.shape[0] == 2 and len(grids) == (2 if name == "unet" else 1)
    if name == "wan":
        expected = expected.unflatten(1, (3, -1)).mean(1)
    assert near(found.flatten(1), expected)
    if name == "unet":
        assert found.shape[1:] == (8, 8)
        both, _ = wordmask.look(model, clip(), PROMPT, words, trajectory=trajectory, start=0.1, end=0.9,
                                layers="0%-100%")
        sides = [each[g].unflatten(2, (int(g**0.5), -1)) for each in every for g in grids]
        large = [torch.nn.functional.interpolate(s.float(), (16, 16), mode="bilinear") for s in sides]
        assert near(both, torch.cat(large).mean(0))


@pytest.fixture(scope="module", params=["unet", "flux"])
def name(request):
    return request.param


def test_all_words_of_a_prompt_get_all_attention(name):
    model = network(name)
    prompt = encode(clip(), PROMPT)[1]
    term = wordmask.Look(columns=torch.ones(1, prompt.columns))
    sampler = wordmask.Levels(term)
    guider = toy.comfy.samplers.CFGGuider(wordmask.steer(model, term))
    guider.set_conds(conditioning(PROMPT), conditioning(PROMPT))
    with torch.inference_mode():
        guider.sample(noise(name) * 0, noise(name), sampler, torch.tensor([0.9, 0.0]), seed=1)
    assert torch.allclose(sampler.maps.mean((1, 4, 16, 16)), torch.tensor(1.0), atol=1e-5)


def test_along_a_latent_under_noise_and_what_the_mask_is(name):
    model, latent = network(name), noise(name, 3, 2)
    options = dict(levels=3, threshold=0.4)
    (m, seen), (again, _) = (wordmask.mask(model, clip(), PROMPT, "hair", latent, **options) for _ in range(2))
    assert torch.equal(m, again) and m.shape == seen.shape == (2, 128, 128)
    assert torch.equal(m, (seen > 0.4).float()) and float(seen.amin()) == 0.0 and near(seen.amax((1, 2)), torch.ones(2))
    alone, _ = wordmask.mask(model, clip(), PROMPT, "hair", latent[1:], **options)
    assert torch.equal(alone, m[1:])  # a batch is two runs
    soft, _ = wordmask.mask(model, clip(), PROMPT, "hair", latent, **options, soft=0.2)
    assert torch.allclose(soft, ((seen - 0.4) / 0.2 + 0.5).clamp(0, 1), atol=1e-6)
    wide, _ = wordmask.mask(model, clip(), PROMPT, "hair", latent, **options, cells=1)
    assert bool((wide >= m).all()) and wide.sum() > m.sum()
    other, _ = wordmask.mask(model, clip(), PROMPT, "hair", latent, **options, seed=1)
    assert not torch.equal(other, m)


def test_looks_at_the_model_as_it_is_and_leaves_it_so(name):
    """Whatever it carries, and without the negative; no map is ever made."""
    model = network(name)
    latent, before = noise(name), toy.sample(model, positive=conditioning("a"), negative=conditioning(""))
    carrying = pag.apply(model, 3.0, "middle" if name == "unet" else "50%", Schedule())
    with toy.count_forwards(model) as count:
        seen = wordmask.mask(carrying, clip(), PROMPT, "hair", latent, levels=3)[1]
    assert (count.calls, count.rows) == (3, 3)
    assert torch.equal(seen, wordmask.mask(model, clip(), PROMPT, "hair", latent, levels=3)[1])
    assert torch.equal(toy.sample(model, positive=conditioning("a"), negative=conditioning("")), before)


def test_bad_input_raises_before_sampling(name):
    model, latent = network(name), noise(name)
    trajectory = path(name, model, PROMPT)
    cases = (
        (dict(words="dog"), 'SteerWordMask: "dog" is not in the prompt "[^"]*", which has: a, happy, person'),
        (dict(words=" ,"), "SteerWordMask: words is empty"),
        (dict(threshold=1.5), "SteerWordMask: threshold 1.5"),
        (dict(start=0.5, end=0.5), "SteerWordMask: the window is empty"),
        (dict(latent=None), "SteerWordMask: wire a trajectory or a latent"),
        (dict(trajectory=trajectory), "SteerWordMask: wire a trajectory or a latent"),
        (dict(latent=latent * 0), "SteerWordMask: the latent is empty"),
        (dict(layers="nine"), 'SteerWordMask: no layer "nine"'),
        (dict(latent=None, trajectory=trajectory, start=0.5, end=0.55), "SteerWordMask: none of the trajectory's 4"),
        (dict(latent=None, trajectory=path("flux" if name == "unet" else "unet",
                                           network("flux" if name == "unet" else "unet"), PROMPT)), "another model"),
    )
    for options, words in cases:
        with toy.count_forwards(model) as count, pytest.raises(ValueError, match=words):
            wordmask.mask(model, clip(), **{**dict(prompt=PROMPT, words="hair", latent=latent), **options})
        assert count.calls == 0


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_on_the_lab_words_are_where_the_portrait_has_them(which):
    """The mean of the map where hair or background is drawn against the mean elsewhere."""
    from steer.models.lab.load import load_clip

    lab, text = case(which, 8), load_clip(which)
    for word in ("hair", "background"):
        gaps = []
        for i in range(3):
            _, seen = wordmask.mask(lab.model, text, caption(lab.sources[i]), word, lab.latent[i : i + 1], levels=2)
            drawn = torch.from_numpy(np.asarray(draw_masks(lab.sources[i])[word])) > 0
            gaps.append(float(seen[0][drawn].mean() - seen[0][~drawn].mean()))
        assert min(gaps) > 0.05 and sum(gaps) / 3 > 0.2, (word, gaps)


def test_a_trajectory_of_one_level_is_that_level():
    model = network("unet")
    whole = path("unet", model, PROMPT)
    each = []
    for i in range(4):
        one = Trajectory(whole.sigmas[[i, -1]], whole.latents[[i, -1]], whole.model, whole.conditioning)
        each.append(wordmask.look(model, clip(), PROMPT, "hair", trajectory=one)[0])
    assert near(wordmask.look(model, clip(), PROMPT, "hair", trajectory=whole)[0], torch.stack(each).mean(0))
