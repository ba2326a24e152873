"""Edits of h-space beside a ControlNet and beside patches of other packs on the same layer.

The oracle puts the same edit into the host's own patch, which comes before the other pack's, as ours does.
"""

from dataclasses import dataclass

import comfy.samplers
import pytest
import torch
import toy
from steer.patches.hspace import asyrp, injectfusion
from steer.patches.hspace.direction import Direction
from steer.patches.hspace.injectfusion import slerp
from steer.patches.shared.beside import source_of
from steer.patches.shared.layers import Layer
from steer.patches.shared.schedule import Schedule
from steer.patches.shared.steering import Source, Term, steer
from steer.patches.shared.trajectory import Trajectory, fingerprint

ALWAYS = Schedule()
ORIGIN = toy.text(5)
OTHERS = ("ControlNet", "ControlNet of the content too", "output_block_patch", "middle_block_after_patch",
          "attn2_patch", "attn2 replaced")


def near(a, b, tolerance=1e-4):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def control():
    return toy.controlnet(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))


def conds(name, control):
    """(positive, negative, prompt of the content)."""
    def controlled(cond):
        return [[c, {**o, "control": control}] for c, o in cond]

    if not name.startswith("ControlNet"):
        return toy.POSITIVE, toy.NEGATIVE, ORIGIN
    return controlled(toy.POSITIVE), controlled(toy.NEGATIVE), controlled(ORIGIN) if "content" in name else ORIGIN


def other(model, name):
    """A clone of `model` with another pack's patch, and the rows at each of its calls."""
    model, calls = model.clone(), []

    def put(function):
        def patch(*args):
            calls.append((args[0]["h"] if isinstance(args[0], dict) else args[0]).shape[0])
            return function(*args)
        return patch

    def attend(q, k, v, options):
        return comfy.ldm.modules.attention.attention_pytorch(q, k, 2 * v, options["n_heads"])

    if name == "output_block_patch":
        model.set_model_output_block_patch(put(
            lambda h, hsp, o: (2 * h.tanh(), 0.5 * hsp) if o["block"] == ("output", 0) else (h, hsp)
        ))
    elif name == "middle_block_after_patch":
        model.set_model_patch(put(lambda args: {"h": 2 * args["h"].tanh()}), "middle_block_after_patch")
    elif name == "attn2_patch":
        model.set_model_attn2_patch(put(lambda n, context, value, o: (n, context, 2 * value)))
    elif name == "attn2 replaced":
        model.set_model_attn2_replace(put(attend), "middle", 0)
    return model, calls



def once(sigmas):
    """Options of one step from the first sigma to 0, which ends at D."""
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    return dict(sigmas=sigmas[[0, -1]], sampler=sampler)


@pytest.mark.parametrize("name", OTHERS[:1] + OTHERS[2:])
def test_asyrp(model, control, name):
    positive, negative, _ = conds(name, control)
    sigmas = toy.sigmas(model)
    dh = torch.stack([toy.noise(30 + i, 1, 8, 8, 128)[0] for i in range(len(sigmas) - 1)])
    direction = Direction(sigmas[:-1], dh, Layer("middle", 0), (4, 16, 16), fingerprint(model))
    own = model.clone()
    own.set_model_output_block_patch(
        lambda h, hsp, o: (h + 1.5 * direction.at(float(o["sigmas"][0])) if o["block"] == ("output", 0) else h, hsp)
    )
    options = dict(positive=positive, negative=negative)
    expected = toy.sample(other(own, name)[0], **options)
    patched, calls = other(model, name)
    out = toy.sample(asyrp.apply(patched, direction, 1.5, ALWAYS), **options)
    assert near(out, expected)
    assert bool(calls) != name.startswith("ControlNet") and set(calls) <= {2}
    after, _ = other(asyrp.apply(model, direction, 1.5, ALWAYS), name)  # whatever the order of the nodes
    assert near(toy.sample(after, **options), expected)
    assert not near(out, toy.sample(patched, **options), 1e-2)
    assert not near(out, toy.sample(asyrp.apply(model, direction, 1.5, ALWAYS)), 1e-2)


def injected(model, name, content, gamma, options):
    """D of one step: the content's features from a run of its own, mixed in by the host's own patch."""
    kept = {}

    def each(options, h):
        return zip(options["cond_or_uncond"], h.chunk(len(options["cond_or_uncond"])), strict=True)

    def keep(h, hsp, options):
        if options["block"] == ("output", 0):
            kept.update(each(options, h))
        return h, hsp

    def put(h, hsp, options):
        if options["block"] == ("output", 0):
            h = torch.cat([slerp(part, kept[index], gamma) for index, part in each(options, h)])
        return h, hsp

    runs = (keep, {"positive": content.conditioning, "start": content.latents[0] / content.sigmas[0]}), (put, {})
    for patch, own in runs:
        clone = model.clone()
        clone.set_model_output_block_patch(patch)
        out = toy.sample(other(clone, name)[0], **{**options, **own}, **once(content.sigmas))
    return out


@dataclass(frozen=True)
class Watch(Term):
    """Keeps the predictions of the source beside the target."""

    source: Source = None
    found: list = None
    node = "Watch"

    def __hash__(self):
        return id(self)

    def branches(self, model):
        return (self.source,)

    def add(self, call, extra, weight):
        self.found.extend(call.predictions[role].clone() for role in (self.source, self.source.negative))


@pytest.mark.parametrize("name", OTHERS)
def test_injectfusion(model, control, name):
    positive, negative, origin = conds(name, control)
    sigmas = toy.sigmas(model)
    latents = torch.stack([0.3 * toy.noise(40) + s * toy.noise(50) for s in sigmas])
    content = Trajectory(sigmas, latents, fingerprint(model), origin)
    options = dict(positive=positive, negative=negative)
    expected = injected(model, name, content, 0.4, options)
    patched, calls = other(model, name)
    ours = injectfusion.apply(patched, content, 0.4, ALWAYS)
    out = toy.sample(ours, **options, **once(sigmas))
    assert near(out, expected)
    assert bool(calls) != name.startswith("ControlNet") and set(calls) <= {4}  # rows of the source too
    after, _ = other(injectfusion.apply(model, content, 0.4, ALWAYS), name)
    assert near(toy.sample(after, **options, **once(sigmas)), expected)
    assert not near(out, toy.sample(patched, **options, **once(sigmas)), 1e-2)
    assert not near(out, toy.sample(injectfusion.apply(model, content, 0.4, ALWAYS), **once(sigmas)), 1e-2)

    with_edit, without = [], []
    for base, found in ((ours, with_edit), (patched, without)):
        toy.sample(steer(base, Watch(ALWAYS, source_of(origin, content), found)), **options, **once(sigmas))
    assert len(with_edit) == 2 and all(near(a, b, 2e-5) for a, b in zip(with_edit, without, strict=True))
