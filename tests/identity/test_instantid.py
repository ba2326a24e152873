"""InstantID against attention and a ControlNet whose contexts are written out."""

import pytest
import torch
import toy
from attention.by_hand import near
from comfy.patcher_extension import WrappersMP
from identity import control, oracle
from identity.by_hand import by_hand, load
from steer.patches.guidance import pag
from steer.patches.identity import instantid
from steer.patches.shared.face import Face
from steer.patches.shared.schedule import Schedule
from torch.nn.functional import adaptive_avg_pool2d

from nodes import ControlNetApplyAdvanced

ALWAYS = Schedule()
WHO = 20 * oracle.rand(1, 512, seed=70)
IMAGE = control.hint()


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def net():
    return control.unet()


@pytest.fixture(scope="module")
def adapter():
    return load("face-resampler")


def tokens(tree, who=WHO):
    """(tokens of the face, of none)."""
    return [oracle.tokens("face-resampler", tree["image_proj"], face=e) for e in (who, torch.zeros(1, 512))]


def steered(model, adapter, net, positive=toy.POSITIVE, negative=toy.NEGATIVE, face=WHO, strength=0.8,
            control_strength=0.7, schedule=ALWAYS, image=IMAGE, weight_type="linear", **options):
    return instantid.apply(
        model, positive, negative, adapter, net, face, image, strength, control_strength, weight_type, "auto", schedule,
        **options,
    )


def sampled(made, **options):
    model, positive, negative = made
    return toy.sample(model, positive=positive, negative=negative, **options)


def written_out(model, tree, net, strength=0.8, control_strength=0.7, others=(), mask=None, window=(0.0, 1.0)):
    """The same by the host's own hooks, with ControlNets that are asked one by one."""
    pair = tokens(tree)

    def share(h):
        return h if mask is None else h * adaptive_avg_pool2d(mask[None], h.shape[-2:])

    nets = [control.part(net, IMAGE, control_strength, window, pair, share), *others]
    conds = control.summed((toy.POSITIVE, toy.NEGATIVE), *nets)
    return by_hand(model, tree, *pair, strength, mask), *conds


def test_is_the_papers_attention_and_controlnet(model, adapter, net):
    tree, made = adapter
    before = toy.sample(model)
    out = sampled(steered(model, made, net))
    assert near(out, sampled(written_out(model, tree, net)))
    for options in (dict(strength=0.0), dict(control_strength=0.0)):  # each part by itself
        part = sampled(steered(model, made, net, **options))
        assert near(part, sampled(written_out(model, tree, net, **options)))
        assert not near(part, out, 1e-2) and not near(part, before, 1e-2)
    assert torch.equal(toy.sample(model), before)


def test_the_text_does_not_reach_its_controlnet_nor_the_face_another(model, adapter, net):
    """Whatever stands before and behind it in the chain."""
    tree, made = adapter
    other, third = control.unet(1), control.unet(2)
    images = control.hint(1), control.hint(2)
    apply = ControlNetApplyAdvanced().apply_controlnet
    parts = control.part(other, images[0], 0.9), control.part(third, images[1], 0.6)

    def chained(before, behind):
        positive, negative = toy.POSITIVE, toy.NEGATIVE
        if before:
            positive, negative = apply(positive, negative, other, images[0], 0.9, 0.0, 1.0)
        ours, positive, negative = steered(model, made, net, positive, negative)
        if behind:
            positive, negative = apply(positive, negative, third, images[1], 0.6, 0.0, 1.0)
        return ours, positive, negative

    outs = []
    for before, behind in ((True, False), (False, True), (True, True)):
        others = [p for p, there in zip(parts, (before, behind), strict=True) if there]
        outs.append(sampled(chained(before, behind)))
        assert near(outs[-1], sampled(written_out(model, tree, net, others=others)))
    assert not near(outs[0], outs[1], 1e-2) and not near(outs[0], outs[2], 1e-2)


def test_two_faces_in_one_picture(model, adapter, net):
    """Two nodes with a mask each: both counted where their mask is, and neither sees the other's tokens."""
    tree, made = adapter
    left = torch.zeros(16, 16)
    left[:, :7] = 1
    fine = [m.repeat_interleave(8, 0).repeat_interleave(8, 1)[None] for m in (left, 1 - left)]
    second = 20 * oracle.rand(1, 512, seed=71)
    first = steered(model, made, net, mask=fine[0])
    both = steered(first[0], made, net, *first[1:], face=second, mask=fine[1])
    pairs, masks = (tokens(tree), tokens(tree, second)), (left, 1 - left)
    hand, parts = model, []
    for pair, mask in zip(pairs, masks, strict=True):
        hand = by_hand(hand, tree, *pair, 0.8, mask)

        def share(h, mask=mask):
            return h * adaptive_avg_pool2d(mask[None], h.shape[-2:])

        parts.append(control.part(net, IMAGE, 0.7, contexts=pair, share=share))
    assert near(sampled(both), sampled((hand, *control.summed((toy.POSITIVE, toy.NEGATIVE), *parts))))


@pytest.mark.parametrize("options, calls", [
    (dict(cfg=1.0), 4), (dict(positive=toy.text(1, tokens=331)), 8), ({}, 4),
], ids=["without negative", "apart", "together"])
def test_rows_get_the_tokens_of_their_own(model, adapter, net, options, calls):
    tree, made = adapter
    prompt = {k: options[k] for k in ("positive",) if k in options}
    sampling = {k: v for k, v in options.items() if k not in prompt}
    ours = steered(model, made, net, **prompt)
    pair = tokens(tree)
    texts = prompt.get("positive", toy.POSITIVE), toy.NEGATIVE
    conds = control.summed(texts, control.part(net, IMAGE, 0.7, contexts=pair))
    with toy.count_forwards(model) as count:
        out = sampled(ours, **sampling)
    assert count.calls == calls
    assert near(out, sampled((by_hand(model, tree, *pair), *conds), **sampling))


def test_beside_guidance_that_asks_for_more_rows(model, adapter, net):
    """The positive through a perturbed network, with the positive's face and ControlNet."""
    tree, made = adapter
    ours, hand = steered(model, made, net), written_out(model, tree, net)
    out, expected = (sampled((pag.apply(m, 2.0, "middle", ALWAYS), *conds)) for m, *conds in (ours, hand))
    assert near(out, expected) and not near(out, sampled(ours), 1e-2)


def test_a_batch_is_two_runs(model, adapter, net):
    ours = steered(model, adapter[1], net)
    start = toy.noise(batch=2)
    out = sampled(ours, start=start)
    for i in range(2):
        assert near(out[i : i + 1], sampled(ours, start=start[i : i + 1]))


def test_the_mean_of_several_pictures_and_a_face_of_the_face_node(model, adapter, net):
    _, made = adapter
    three = 20 * oracle.rand(3, 512, seed=72)
    out = sampled(steered(model, made, net, face=Face(three)), steps=2)
    assert near(out, sampled(steered(model, made, net, face=three.mean(0)), steps=2))


def test_window(model, adapter, net):
    tree, made = adapter
    out = sampled(steered(model, made, net, strength=0.0, schedule=Schedule(0.0, 0.5)))
    hand = written_out(model, tree, net, window=(0.0, 0.5))
    assert near(out, toy.sample(model, positive=hand[1], negative=hand[2]))


@pytest.mark.parametrize("options", [dict(strength=0.0, control_strength=0.0), dict(schedule=Schedule(0.5, 0.5))])
def test_off_is_no_node(model, adapter, net, options):
    ours, positive, negative = steered(model, adapter[1], net, **options)
    assert not ours.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer")
    assert positive is toy.POSITIVE and negative is toy.NEGATIVE


def test_nothing_that_comes_in_is_changed(model, adapter, net):
    """The loaded ControlNet serves others, and a conditioning others use."""
    apply = ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(toy.POSITIVE, toy.NEGATIVE, net, IMAGE, 0.9, 0.0, 1.0)
    before, kept = toy.sample(model, positive=positive, negative=negative), [dict(o) for _, o in (*positive, *negative)]
    sampled(steered(model, adapter[1], net, positive, negative))
    assert [dict(o) for _, o in (*positive, *negative)] == kept
    assert torch.equal(toy.sample(model, positive=positive, negative=negative), before)
    assert type(net).__name__ == "ControlNet" and net.previous_controlnet is None and net.cond_hint_original is None


def test_a_copy_keeps_its_context(model, adapter, net):
    """Nodes of other packs copy the ControlNets of a conditioning."""
    ours, positive, negative = steered(model, adapter[1], net)
    copied = [[[c, {**o, "control": o["control"].copy()}] for c, o in each] for each in (positive, negative)]
    assert near(sampled((ours, *copied)), sampled((ours, positive, negative)))


def test_bad_input_is_told(model, adapter, net):
    from comfy.controlnet import T2IAdapter

    (_, made), (_, plus) = adapter, load("plus")
    sketch = T2IAdapter(None, 3, 8, "nearest")
    for args, options, words in (
        ((plus, net), {}, "plus-0.safetensors is IP-Adapter plus; use SteerIPAdapter for it"),
        ((made, sketch), {}, "control_net is T2IAdapter, which has no context"),
        ((made, net), dict(control_strength=-1.0), "control_strength -1.0 must be"),
        ((made, net), dict(face=WHO[:, :128]), "takes face embeddings of width 512, and this one has 128"),
    ):
        with pytest.raises(ValueError, match=f"^SteerInstantID: .*{words}"):
            steered(model, *args, **options)
    ours, positive, negative = steered(model, made, net)
    lost = [[c, {k: v for k, v in o.items() if k != "model_conds"}] for c, o in positive]
    with pytest.raises(ValueError, match="the tokens of a face are gone from its conditioning"):
        sampled((ours, lost, negative))
