"""The source beside the target: the same predictions as in runs of its own, whatever else is in the batch."""

from dataclasses import dataclass, replace

import comfy.samplers
import node_helpers
import pytest
import torch
import toy
from steer.patches.guidance import pag
from steer.patches.shared.architectures import editable_layers, self_attention_layers
from steer.patches.shared.beside import source_of
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import SHARE, Source, Term, steer
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

    def taps(self, model):
        if not self.layers:
            return ()
        return [(pair, self_attention_layers(model, self.layers, {}), self.look)
                for pair in ((self.source, "positive"), (self.source.negative, "negative"))]

    def look(self, attention, call, role):
        n = attention.q.shape[0] // 2
        k, v = (torch.cat((t[:n], t[:n])) for t in (attention.k, attention.v))
        return replace(attention, k=k, v=v)

    def features(self, model):
        return [(layer, self.swap) for layer in editable_layers(model, self.blocks)] if self.blocks else ()

    def swap(self, h, source, call, weight):
        return source

    def add(self, call, extra, weight):
        self.found.setdefault(call.level, {k: v.clone() for k, v in call.predictions.items()})


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
    sigmas, start = trajectory.sigmas, trajectory.latents[0]
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    options = dict(positive=ORIGIN, sigmas=sigmas, start=start / sigmas[0], sampler=sampler)
    attentive = "middle" if "UNet" in str(type(model.model.diffusion_model)) else "single, double"
    steered, _ = watched(model, trajectory, layers=attentive)
    assert near(toy.sample(steered, **options), toy.sample(model, **options))
    other = {**options, "positive": toy.POSITIVE}
    assert not near(toy.sample(steered, **other), toy.sample(model, **other), 1e-3)


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
    sigmas, start = trajectory.sigmas, trajectory.latents[0]
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    options = dict(sigmas=sigmas, start=start / sigmas[0], sampler=sampler)
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


def test_two_sources_cannot_be_beside_one_target(model):
    steered, _ = watched(model, path(model))
    twice, _ = watched(steered, path(model))
    with pytest.raises(ValueError, match="Watch, Watch: they name different sources"):
        toy.sample(twice)
