"""Prompt-to-Prompt without maps against the paper's maps, its limits, and what it refuses."""

import comfy.samplers
import pytest
import torch
import toy
from attention.by_hand import near
from attention.texts import clip, conditioning, maps, network, one_step, path, times, watched
from comfy.patcher_extension import WrappersMP
from steer.patches.attention import prompttoprompt
from steer.patches.guidance import apg, pag
from steer.patches.shared.alignment import align
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.trajectory import Trajectory
from steer.patches.shared.words import encode

SOURCE = "a happy person, blue hair, a hat"
PROMPTS = {
    "refine": "a happy old person, hair, a red hat, glasses",
    "replace": "a sad person, reddishorange hair, a hat",
    "reorder": "a hat: blue person, happy hair",
}
NEGATIVE = "a dog"


def steered(model, trajectory, operation="refine", prompt=None, source=SOURCE, **options):
    """(model, positive)."""
    prompt = PROMPTS[operation] if prompt is None else prompt
    options = {"self_replace": 0.0, "cross_replace": 1.0, **options}
    made, positive, _ = prompttoprompt.apply(model, clip(), trajectory, source, prompt, operation, **options)
    return made, positive


def conds(positive):
    return dict(positive=positive, negative=conditioning(NEGATIVE))


def explicit(name, model, trajectory, options, operation, weights="", source_weights="", word_map="", self_from=None,
             cross=True, source=SOURCE, prompt=None, cfg=5.0, alpha=0.0):
    """One step with the paper's maps made: of the source from a run of its own, of the target edited and multiplied."""
    before, after = (encode(clip(), text)[1] for text in (source, prompt or PROMPTS[operation]))
    made = align(before, after, operation, word_map)
    own_share, M, alpha, c, c_s = alpha, made.M, made.alpha, after.weights(weights), before.weights(source_weights)
    kept, source_runs, edited = {}, True, []

    def look(kind, number, q, k, v, heads, text):
        if source_runs:
            kept[number] = q, k
            return None
        rows = slice(len(q) // 2, None)  # the host puts the negative last in its list, first in the batch
        own = maps(q, k, heads)
        out = times(own, v)
        if kind == "self":
            if self_from is not None and q.shape[1] <= self_from:
                out[rows] = times(maps(*kept[number], heads), v[rows])
            return out
        if kind == "cross" and cross:
            A_t, A_s = own[rows], maps(*kept[number], heads)
            A_s = A_s.unflatten(3, (-1, before.columns)).sum(3) * c_s  # repeats of the text, if any
            A_t = A_t.unflatten(3, (-1, after.columns)).sum(3)
            edited.append(number)
            mixed = torch.lerp(c * (alpha * (A_s @ M) + (1 - alpha) * A_t), A_t, own_share)
            out[rows] = times(mixed, v[rows][:, : after.columns])
        if kind == "joint":
            q_t, k_t, (q_s, k_s) = q[rows], k[rows], kept[number]
            n = text + (16 if name in ("z-image", "lumina", "sd3", "qwen") else 64)
            if self_from is not None:
                q_t, k_t = q_t.clone(), k_t.clone()
                q_t[:, text:n], k_t[:, text:n] = q_s[:, text:n], k_s[:, text:n]
                own_rows = maps(q_t, k_t, heads)
            else:
                own_rows = own[rows]
            a = own_rows.clone()
            if cross:
                edited.append(number)
                columns, its = after.columns, before.columns
                A_s = maps(q_s[:, text:n], k_s[:, :text], heads)[..., :its]
                A_t = a[:, :, text:n, :columns]
                mass = (A_t * alpha).sum(-1, keepdim=True) / (A_s @ (M @ alpha))[..., None]
                mixed = torch.lerp(c * (mass * (A_s * c_s @ M * alpha) + (1 - alpha) * A_t), A_t, own_share)
                a[:, :, text:n, :columns] = mixed
            out[rows] = times(a, v[rows])
        return out

    hooked = watched(name, model, look)
    toy.sample(hooked, 1.0, **{**options, **conds(trajectory.conditioning)})
    source_runs = False
    texts = conds(conditioning(prompt or PROMPTS[operation]))
    out = toy.sample(watched(name, model, look), cfg, **{**options, **texts})
    assert edited or not cross
    return out


@pytest.fixture(scope="module", params=["unet", "flux"])
def name(request):
    return request.param


CASES = [
    ("unet", "refine", {}), ("unet", "replace", {}), ("unet", "reorder", dict(word_map="happy: blue, #5: #5")),
    ("unet", "refine", dict(weights="glasses: 2.5, hat: -0.5")), ("unet", "replace", dict(source_weights="blue: 3")),
    ("flux", "refine", {}), ("flux", "replace", {}), ("flux", "reorder", dict(word_map="happy: blue")),
    ("flux", "refine", dict(weights="glasses: 2.5, hat: -0.5", source_weights="happy: 0.3")),
    ("unet", "refine", dict(alpha=0.4, weights="glasses: 2.5")), ("flux", "refine", dict(alpha=0.4, weights="hat: 3")),
    ("sd3", "refine", {}), ("qwen", "refine", {}), ("lumina", "refine", {}), ("z-image", "refine", {}),
    ("wan", "refine", {}),
]


@pytest.mark.parametrize("name, operation, options", CASES, ids=lambda value: str(value))
def test_is_the_papers_edit_of_explicit_maps(name, operation, options):
    model = network(name)
    trajectory = path(name, model, SOURCE)
    step = one_step(trajectory)
    ours, positive = steered(model, trajectory, operation, **options)
    out = toy.sample(ours, **step, **conds(positive))
    assert near(out, explicit(name, model, trajectory, step, operation, **options), 1e-5)
    assert not near(out, toy.sample(model, **step, **conds(positive)), 1e-3)


@pytest.mark.parametrize("cross", [False, True])
def test_attention_within_the_picture_is_the_sources(name, cross):
    """On a UNet in layers with at most a quarter of the latent's places; on a DiT in all, text columns included."""
    model = network(name)
    trajectory = path(name, model, SOURCE)
    step = one_step(trajectory)
    ours, positive = steered(model, trajectory, self_replace=1.0, cross_replace=1.0 if cross else 0.0)
    out = toy.sample(ours, **step, **conds(positive))
    assert near(out, explicit(name, model, trajectory, step, "refine", self_from=64, cross=cross), 1e-5)
    if name == "unet":
        everywhere, _ = steered(model, trajectory, self_replace=1.0, cross_replace=1.0 if cross else 0.0,
                                layers="input, middle, output")
        out = toy.sample(everywhere, **step, **conds(positive))
        assert near(out, explicit(name, model, trajectory, step, "refine", self_from=256, cross=cross), 1e-5)


@pytest.mark.parametrize("name", ["unet", "flux", "sd3", "qwen", "lumina", "z-image", "wan"])
@pytest.mark.parametrize("operation", ["refine", "replace", "reorder"])
def test_the_same_prompt_returns_the_source(name, operation):
    """Also with a blend, which then has nothing to put back; at the source's latents its rows and the target's are
    equal."""
    model = network(name)
    trajectory = path(name, model, SOURCE)
    step = one_step(trajectory)
    ours, positive = steered(model, trajectory, operation, SOURCE, self_replace=0.5, cross_replace=0.8)
    assert near(toy.sample(ours, **step, **conds(positive)), toy.sample(model, **step, **conds(positive)))


@pytest.mark.parametrize("text", ["longer", "much longer"])
def test_texts_of_unequal_length(text):
    """Repeated by the host to a common length, or, where that is too much for it, in forwards of their own."""
    model, long = network("unet"), SOURCE + ", very" * (100 if text == "longer" else 290) + " large"
    trajectory = path("unet", model, SOURCE)
    step = one_step(trajectory)
    ours, positive = steered(model, trajectory, prompt=long)
    assert positive[0][0].shape[1] in (231, 616)
    for cfg in (1.0,):  # with the negative the host's own batch differs
        out = toy.sample(ours, cfg, **step, **conds(positive))
        oracle = explicit_positive(model, trajectory, step, long)
        assert near(out, oracle, 1e-5)


def explicit_positive(model, trajectory, step, prompt):
    """`explicit` of a refinement on the UNet without a negative."""
    before, after = (encode(clip(), text)[1] for text in (SOURCE, prompt))
    made, kept, source_runs = align(before, after, "refine"), {}, True

    def look(kind, number, q, k, v, heads, text):
        if kind == "cross":
            if source_runs:
                kept[number] = maps(q, k, heads)
                return None
            return times(made.alpha * (kept[number] @ made.M) + (1 - made.alpha) * maps(q, k, heads), v)

    toy.sample(watched("unet", model, look), 1.0, **{**step, **conds(trajectory.conditioning)})
    source_runs = False
    return toy.sample(watched("unet", model, look), 1.0, **{**step, **conds(conditioning(prompt))})


@pytest.mark.parametrize("options", [
    dict(cross_replace=0.0), dict(alpha=1.0), dict(cross_replace=0.0, blend_words="hat", blend_start=1.0),
], ids=str)
def test_off_is_no_node(name, options):
    model = network(name)
    off, positive = steered(model, path(name, model, SOURCE), **options)
    plain = toy.sample(model, **conds(positive))
    if not options.get("blend_words"):
        assert not off.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
        with toy.count_forwards(model) as count:
            assert torch.equal(toy.sample(off, **conds(positive)), plain)
        assert (count.calls, count.rows) == (4, 8)
    else:
        assert near(toy.sample(off, **conds(positive)), plain)


def test_windows_are_shares_of_the_steps_and_cost_nothing_outside(name):
    model = network(name)
    ours, positive = steered(model, path(name, model, SOURCE), cross_replace=0.3, self_replace=0.5)
    with toy.count_forwards(model) as count:
        toy.sample(ours, **conds(positive))
    percent = model.get_model_object("model_sampling").percent_to_sigma
    inside = sum(float(s) > float(percent(0.5)) for s in toy.sigmas(model)[:-1])
    assert 0 < inside < 4 and (count.calls, count.rows) == (4, 8 + 2 * inside)


@pytest.mark.parametrize("options", [{}, dict(blend_words="hat"), dict(self_replace=0.5)], ids=str)
def test_batch_is_two_runs_and_apart_is_together(name, options, monkeypatch):
    model = network(name)
    both = path(name, model, SOURCE, 2)
    start = toy.noise(3, 2)
    ours, positive = steered(model, both, **options)
    out = toy.sample(ours, start=start, **conds(positive))
    assert torch.equal(out, toy.sample(ours, start=start, **conds(positive)))
    for i in range(2):
        one = Trajectory(both.sigmas, both.latents[:, i : i + 1], both.model, both.conditioning)
        alone, _ = steered(model, one, **options)
        assert near(out[i : i + 1], toy.sample(alone, start=start[i : i + 1], **conds(positive)), 1e-4)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *a, **k: 1e18)
    assert near(toy.sample(ours, start=start, **conds(positive)), out, 1e-4)


def test_the_blend_keeps_the_source_outside(name):
    """Exactly at the end; nothing is put back where everything is attended to, everything where nothing is."""
    model = network(name)
    trajectory = path(name, model, SOURCE)
    start = toy.noise(3)
    ours, positive = steered(model, trajectory, blend_words="hat", blend_threshold=0.6)
    out = model.model.process_latent_in(toy.sample(ours, start=start, **conds(positive)))
    same = (out - trajectory.source).abs().amax(1) < 1e-5
    assert 0 < int(same.sum()) < same.numel()
    none, _ = steered(model, trajectory, blend_words="hat", blend_threshold=1.0, blend_start=0.0)
    out = model.model.process_latent_in(toy.sample(none, start=start, **conds(positive)))
    assert torch.allclose(out, trajectory.source, atol=1e-5)
    every, _ = steered(model, trajectory, blend_words="hat", blend_threshold=0.0)
    free, _ = steered(model, trajectory)
    assert near(toy.sample(every, start=start, **conds(positive)), toy.sample(free, start=start, **conds(positive)))


def test_composes_and_leaves_the_model_as_it_is(name):
    model = network(name)
    trajectory = path(name, model, SOURCE)
    base = pag.apply(apg.apply(model, 1.0, 10.0, -0.5, Schedule()), 2.0, "middle" if name == "unet" else "single.1",
                     Schedule())
    ours, positive = steered(base, trajectory)
    before = toy.sample(model, **conds(positive))
    out = toy.sample(ours, **conds(positive))
    assert not near(out, toy.sample(base, **conds(positive)), 1e-3)
    assert not near(out, toy.sample(steered(model, trajectory)[0], **conds(positive)), 1e-3)
    called = []

    def override(function, *args, **kwargs):
        called.append(1)
        return function(*args, **kwargs)

    other = ours.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = override
    assert near(toy.sample(other, **conds(positive)), out) and called
    assert torch.equal(toy.sample(model, **conds(positive)), before)


def test_no_map_is_made(name, monkeypatch):
    """With an attention of the host that makes none, no tensor of the run has a place for each pair of tokens."""
    from comfy.ldm.flux import math
    from comfy.ldm.modules import attention
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.ndim > 2:
                    pairs.add(tuple(t.shape[-2:]))
            return out

    def run(made):
        pairs.clear()
        with Sizes():
            toy.sample(made, **conds(positive))
        return pairs & {"unet": {(256, 77), (64, 77)}, "flux": {(141, 141), (64, 77), (64, 141)}}[name]

    pairs, model = set(), network(name)
    ours, positive = steered(model, path(name, model, SOURCE), self_replace=1.0, blend_words="hat")
    for module, function in ((attention, attention.attention_pytorch), (math, attention.attention_pytorch)):
        monkeypatch.setattr(module, "optimized_attention", function)
    assert run(ours) == set()
    for module in (attention, math):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_basic)
    assert len(run(ours)) >= 2  # so it would be seen


def test_bad_input_raises_before_sampling(name):
    model = network(name)
    trajectory = path(name, model, SOURCE)
    for options, words in (
        (dict(operation="replace", prompt="a person"), '7 and 2 words, and "replace" .* take "refine"'),
        (dict(weights="dog: 2"), '"dog" is not in the prompt'), (dict(weights="hat"), 'weight "hat" cannot be read'),
        (dict(source_weights="glasses: 2"), '"glasses" is not in the prompt "a happy person'),
        (dict(blend_words="dog"), '"dog" is not in the prompt "a happy old'),
        (dict(word_map="a: b"), "word_map is for"), (dict(cross_replace=1.5), "cross_replace 1.5 must be"),
        (dict(alpha=-0.1), "alpha -0.1 must be"),
        (dict(weights="hat: 2", cross_replace=0.0), "weights count while .* raise cross_replace above 0"),
        (dict(source_weights="hat: 2", alpha=1.0), "weights count while .* take alpha below 1"),
        (dict(blend_words="hat", blend_threshold=-1.0), "blend_threshold -1.0"), (dict(layers="x"), 'no layer "x"'),
    ):
        with pytest.raises(ValueError, match=f"SteerPromptToPrompt: .*{words}"):
            steered(model, trajectory, **options)
    ours, positive = steered(model, trajectory)
    low = Trajectory(trajectory.sigmas[2:], trajectory.latents[2:], trajectory.model, trajectory.conditioning)
    with pytest.raises(ValueError, match="SteerPromptToPrompt: .*another model"):
        steered(model, path("unet", toy.model(kind="v"), SOURCE))
    again, _ = steered(ours, trajectory)
    blending, _ = steered(model, trajectory, cross_replace=0.0, blend_words="hat")
    for made, start, texts, words in (
        (ours, toy.noise(), conditioning(SOURCE), "the guider's positive is not the edited prompt"),
        (blending, toy.noise(), conditioning(SOURCE), "the guider's positive is not the edited prompt"),
        (ours, toy.noise(height=24), positive, "of a size other than the latent's"),
        (steered(model, low)[0], toy.noise(), positive, "the sampler starts at sigma .* invert it with"),
        (again, toy.noise(), positive, "the model carries it twice at the same time"),
    ):
        with toy.count_forwards(model) as count, pytest.raises(ValueError, match=f"SteerPromptToPrompt.*{words}"):
            toy.sample(made, start=start, **conds(texts))
        assert count.calls == 0
