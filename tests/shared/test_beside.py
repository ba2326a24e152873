"""The source beside the target: the same predictions as in runs of its own, whatever else is in the batch."""

import gc
from dataclasses import dataclass, replace

import comfy.samplers
import node_helpers
import pytest
import torch
import toy
from steer.patches.guidance import pag
from steer.patches.shared import beside
from steer.patches.shared.architectures import editable_layers, self_attention_layers, unet
from steer.patches.shared.attention import Attention
from steer.patches.shared.beside import source_of
from steer.patches.shared.run import Call, Run
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import SHARE, STACK, Source, Term, steer
from steer.patches.shared.trajectory import Trajectory, fingerprint

ALWAYS = Schedule()
ORIGIN = toy.text(5)


def path(model, batch=1, conditioning=ORIGIN, steps=4, size=16):
    sigmas = toy.sigmas(model, steps)
    clean = 0.3 * toy.noise(40, batch, size, size)
    latents = torch.stack([clean + s * toy.noise(50, batch, size, size) for s in sigmas])
    return Trajectory(sigmas, latents, fingerprint(model), conditioning)


@dataclass(frozen=True)
class Watch(Term):
    """Keeps what it is given; with `layers`, the target attends to the source's keys and values there; with `blocks`,
    it gets the source's features."""

    source: Source = None
    found: dict = None
    layers: str = ""
    blocks: str = ""
    node = "Watch"

    def __hash__(self):
        return id(self)

    def branches(self, model):
        return (self.source,)

    def attention(self, model):
        if not self.layers:
            return ()
        layers = self_attention_layers(model, self.layers, {})
        return (Attention("self", layers, self.look, ("keys", "values"), (self.source,)),)

    def look(self, target, beside, attend, call, weight, role):
        (source,) = beside
        k, v = (image_of(source, s, target, t) for s, t in ((source.k, target.k), (source.v, target.v)))
        return attend(replace(target, k=k, v=v))

    def features(self, model):
        return [(layer, self.swap) for layer in editable_layers(model, self.blocks)] if self.blocks else ()

    def swap(self, h, source, call, weight):
        return source

    def add(self, call, extra, weight):
        self.found.setdefault(call.level, {k: v.clone() for k, v in call.predictions.items()})


def image_of(source, s, target, t):
    """t with the image tokens of s."""
    out = t.clone()
    out[:, slice(*target.image)] = s[:, slice(*source.image)]
    return out


def one_step(trajectory):
    """Options for a step of one's own from where the trajectory begins."""
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    return dict(sigmas=trajectory.sigmas, start=trajectory.latents[0] / trajectory.sigmas[0], sampler=sampler)


def watched(model, trajectory, conditioning=ORIGIN, **kwargs):
    found = {}
    return steer(model, Watch(ALWAYS, source_of(conditioning, trajectory), found, **kwargs)), found


def alone(model, x, sigma, positive, negative):
    """D of both conds from runs of their own: at one sigma, a step to 0 ends at D."""
    pair = torch.tensor([sigma, 0.0])
    n, ends = torch.zeros_like(x), []
    for conds in (positive, negative):
        keep = model.get_model_object("model_sampling")
        start = (x - keep.noise_scaling(pair[0], n, n.clone())) / keep.noise_scaling(pair[0], n + 1, n.clone())
        sampler = comfy.samplers.ksampler("euler")
        sampler.max_denoise = lambda *_: False
        ends.append(toy.sample(model, 1.0, sampler, positive=conds, negative=negative, start=start, sigmas=pair))
    return [model.model.process_latent_in(end) for end in ends]


def near(a, b, tolerance=2e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.fixture(scope="module", params=["unet", "flux"])
def model(request):
    return toy.model() if request.param == "unet" else toy.flux()


@pytest.mark.parametrize("case", [
    "plain", "batch", "longer text", "much longer text", "area", "PAG", "not shared", "cfg 1",
])
def test_the_source_is_predicted_as_by_itself_and_the_target_is_not_changed(model, case):
    batch = 2 if case == "batch" else 1
    tokens = {"longer text": 154, "much longer text": 513}.get(case, 77)
    origin = toy.text(5, tokens=tokens)
    options = dict(cfg=1.0 if case == "cfg 1" else 5.0, start=toy.noise(batch=batch))
    if case == "area":
        area = node_helpers.conditioning_set_values(toy.text(8), {"area": (8, 16, 0, 0), "set_area_to_bounds": False})
        options["positive"] = toy.POSITIVE + area
    base = pag.apply(model, 2.0, "middle" if "UNet" in str(type(model.model.diffusion_model)) else "single.1", ALWAYS) \
        if case in ("PAG", "not shared") else model
    if case == "not shared":
        base.model_options[SHARE] = False
    trajectory = path(model, batch)
    steered, found = watched(base, trajectory, origin)
    assert near(toy.sample(steered, **options), toy.sample(base, **options))
    assert len(found) == 4
    sigma = sorted(found)[2]
    source = source_of(origin, trajectory)
    positive, negative = alone(model, trajectory.at(sigma), sigma, origin, toy.NEGATIVE)
    assert near(found[sigma][source], positive)
    if case == "cfg 1":
        assert source.negative not in found[sigma]
    elif case != "area":  # there the run's negative has a part of its own for it
        assert near(found[sigma][source.negative], negative)


def test_one_forward_of_twice_the_rows(model):
    steered, _ = watched(model, path(model))
    with toy.count_forwards(model) as plain:
        toy.sample(model)
    with toy.count_forwards(model) as both:
        toy.sample(steered)
    assert (both.calls, both.rows) == (plain.calls, 2 * plain.rows)


def test_a_target_that_is_the_source_attends_as_before(model):
    """At the source's latents with the source's prompt, its keys and values are one's own."""
    trajectory = path(model, steps=1)
    options = dict(positive=ORIGIN, **one_step(trajectory))
    attentive = "middle" if "UNet" in str(type(model.model.diffusion_model)) else "single, double"
    steered, _ = watched(model, trajectory, layers=attentive)
    assert near(toy.sample(steered, **options), toy.sample(model, **options))
    other = {**options, "positive": toy.POSITIVE}
    assert not near(toy.sample(steered, **other), toy.sample(model, **other), 1e-3)


def swapped_by_hand(model, origin, options):
    """The target's step with the keys and values that the source's image tokens have in a step of its own, by the
    host's own hook."""
    joint, kept = not unet.matches(model.model.diffusion_model), []

    def image(t):
        return t[:, :, -64:] if joint else t  # 16 x 16 in patches of 2 x 2, after the text

    def hook(function, q, k, v, *args, **kwargs):
        if joint or q.shape[1] == k.shape[1]:
            if sampling_source:
                kept.append((image(k).clone(), image(v).clone()))
            else:
                k, v = k.clone(), v.clone()
                for mine, its in zip((k, v), kept.pop(0), strict=True):
                    image(mine).copy_(its)
        return function(q, k, v, *args, **kwargs)

    hooked = model.clone()
    hooked.model_options["transformer_options"]["optimized_attention_override"] = hook
    sampling_source = True
    toy.sample(hooked, positive=origin, **options)
    sampling_source = False
    return toy.sample(hooked, **options)


@pytest.mark.parametrize("case", ["plain", "longer text", "batch", "conds apart", "source apart", "PAG"])
def test_the_source_attention_reaches_both_halves(model, case, monkeypatch):
    """As from a run of its own, whatever is in the batch and however the host cuts it."""
    batch, on_unet = 2 if case == "batch" else 1, unet.matches(model.model.diffusion_model)
    origin = toy.text(5, tokens=154 if case == "longer text" else 77)
    trajectory = path(model, batch, steps=1)
    options, everywhere = one_step(trajectory), "input, middle, output" if on_unet else "double, single"
    base = pag.apply(model, 2.0, "middle" if on_unet else "single.1", ALWAYS) if case == "PAG" else model
    steered, _ = watched(base, trajectory, origin, layers=everywhere)
    if case == "source apart":
        monkeypatch.setattr(beside, "_together", lambda *_: None)
    if case == "conds apart":
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *a, **k: 1e18)
    with toy.count_forwards(model) as count:
        moved = toy.sample(steered, **options)
    assert not near(moved, toy.sample(base, **options), 1e-3)
    if case not in ("PAG", "longer text"):
        assert count.calls == (2 if "apart" in case else 1)
        assert near(moved, swapped_by_hand(model, origin, options))
    else:  # every row takes the source's keys and values, in whichever forward it runs
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *a, **k: 1e18)
        assert near(toy.sample(steered, **options), moved)


@pytest.mark.parametrize("case", ["plain", "much longer text", "batch", "PAG", "conds apart"])
def test_the_source_features_reach_both_halves(case, monkeypatch):
    """A target that is the source stays as it is, another one is what the host's own patch makes of it; in one batch,
    in forwards of their own, and where the host has memory for one cond at a time."""
    model = toy.model()
    batch, tokens = 2 if case == "batch" else 1, 513 if case == "much longer text" else 77
    origin = toy.text(5, tokens=tokens)
    trajectory = path(model, batch, steps=1)
    if case == "conds apart":
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *a, **k: 1e18)
    base = pag.apply(model, 2.0, "output.2", ALWAYS) if case == "PAG" else model
    options = one_step(trajectory)
    steered, found = watched(base, trajectory, origin, blocks="middle")
    once = toy.sample(steered, positive=origin, **options)
    assert near(once, toy.sample(base, positive=origin, **options))
    with toy.count_forwards(model) as count:
        moved = toy.sample(steered, **options)
    # texts of 513 and 77 tokens are not run together by the host either
    assert count.calls == {"conds apart": 2, "much longer text": 3}.get(case, 1)
    assert not near(moved, toy.sample(base, **options), 1e-3)
    if case == "plain":  # the same rows, injected by the host's own patch
        kept = []

        def keep(h, hsp, options):
            kept.append(h.clone()) if options["block"] == ("output", 0) else None
            return h, hsp

        def put(h, hsp, options):
            return (kept[0] if options["block"] == ("output", 0) else h), hsp

        first, second = model.clone(), model.clone()
        first.set_model_output_block_patch(keep)
        second.set_model_output_block_patch(put)
        toy.sample(first, positive=origin, **options)
        assert near(moved, toy.sample(second, **options))


def test_features_of_a_part_of_the_picture_are_refused():
    model = toy.model()
    area = node_helpers.conditioning_set_values(toy.text(8), {"area": (8, 16, 0, 0), "set_area_to_bounds": False})
    steered, _ = watched(model, path(model), blocks="middle")
    with pytest.raises(ValueError, match=r"Watch: the source fills the latent, .* \(middle: .* take off its area"):
        toy.sample(steered, positive=toy.POSITIVE + area)
    assert torch.equal(toy.sample(model), toy.sample(toy.model()))


@pytest.mark.parametrize("apart", [False, True])
def test_two_sources_beside_one_target(model, apart, monkeypatch):
    """Each term is given its own source, and each source is predicted as if it were the only one."""
    if apart:
        monkeypatch.setattr(beside, "_together", lambda *_: None)
    first, second = path(model, 2), path(model, 2, toy.text(6))
    second = replace(second, latents=second.latents.flip(-1))
    names = ("middle", "output") if unet.matches(model.model.diffusion_model) else ("double", "single")
    options = dict(start=toy.noise(batch=2), steps=1)
    once, seen = watched(model, first, layers=names[0])
    twice, found = watched(once, second, toy.text(6), layers=names[1])
    only, alone = watched(model, second, toy.text(6), layers=names[1])
    with toy.count_forwards(model) as count:
        both = toy.sample(twice, **options)
    assert (count.calls, count.rows) == ((3, 12) if apart else (1, 12))
    for each, its in ((once, seen), (only, alone)):
        its.clear()
        assert not near(toy.sample(each, **options), both, 1e-3)
        (said,), (level,) = its.values(), found
        for role in said.keys() - {"positive", "negative"}:
            assert near(found[level][role], said[role])
    # with the same source for both, it is what one term does in all these layers
    same, _ = watched(once, first, layers=names[1])
    assert near(toy.sample(same, **options), toy.sample(watched(model, first, layers=", ".join(names))[0], **options))


def test_two_edits_of_the_same_keys_are_refused():
    model = toy.model()
    trajectory = path(model)
    steered, _ = watched(model, trajectory, layers="middle, output.0")
    again, _ = watched(steered, trajectory, layers="output")
    with pytest.raises(ValueError, match=r"both replace the keys and values of the attention in output\.0; give"):
        toy.sample(again)
    (term,) = steered.model_options[STACK]
    with pytest.raises(ValueError, match="both replace the keys"):
        toy.sample(steer(steered, replace(term)))  # the very same node, twice
    beyond, _ = watched(steered, trajectory, layers="output.1-3")
    assert not near(toy.sample(beyond), toy.sample(steered), 1e-4)


def test_what_a_step_holds_of_the_source_does_not_wait_for_the_garbage_collector():
    """Keys, values and features of one step are gone with it; of any run before, nothing is left."""
    model = toy.model()
    trajectory = path(model)
    watch = Watch(ALWAYS, source_of(ORIGIN, trajectory), {}, "output.1", "output.1")
    gc.collect()
    gc.disable()
    try:
        toy.sample(steer(model, watch), start=trajectory.latents[0] / trajectory.sigmas[0], sigmas=trajectory.sigmas)
        assert not [o for o in gc.get_objects() if type(o) in (Run, Call)]
    finally:
        gc.enable()
