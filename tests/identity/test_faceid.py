"""FaceID and its kin against attention written out, with the file's own LoRA in the weights."""

import pytest
import torch
import toy
from attention.by_hand import near
from comfy.patcher_extension import WrappersMP
from identity import oracle
from identity.by_hand import ORDER, blank, by_hand, encoder, load, pictures
from steer.patches.identity import faceid
from steer.patches.shared.face import Face
from steer.patches.shared.schedule import Schedule
from torch.nn.functional import normalize

ALWAYS = Schedule()
KINDS = ("faceid", "faceid-plus v1", "faceid-plus v2", "portrait", "face-resampler")
POINTS = torch.tensor([[14.0, 16], [25, 15], [20, 22], [15, 28], [25, 27]])


def face(n=1, seed=0):
    """Faces as SteerFace gives them, with an embedding that is not of length 1."""
    embedding = 20 * oracle.rand(n, 512, seed=60 + seed)
    keypoints = POINTS + torch.arange(n)[:, None, None]
    return Face(embedding, keypoints, pictures(n, seed))


def steered(model, adapter, its=None, strength=0.8, weight_type="linear", layers="auto", combine="concat",
            unconditional="as trained", structure=1.0, lora_strength=1.0, schedule=ALWAYS, **options):
    options = {"clip_vision": encoder(), **options}
    its = face() if its is None else its
    return faceid.apply(model, adapter, its, strength, weight_type, layers, combine, unconditional, structure,
                        lora_strength, schedule, **options)


def e_of(variant, tree, its=None, structure=1.0):
    """Tokens of a face, or of none."""
    who = torch.zeros(1, 512) if its is None else its.embedding
    who = who if variant == "face-resampler" else normalize(who, dim=-1)
    x = None
    if "plus" in variant:
        x = blank("plus") if its is None else encoder().encode_image(its.crop(224)).penultimate_hidden_states
    return oracle.tokens(variant, tree["image_proj"], x, who, structure)


def merged(tree, strength=1.0):
    """A toy model with the file's LoRA in its weights."""
    model = toy.model()
    network = model.model.diffusion_model
    groups = {"input": network.input_blocks, "output": network.output_blocks, "middle": [network.middle_block]}
    for n, (group, index) in enumerate(ORDER):
        (spatial,) = (m for m in groups[group][index] if hasattr(m, "transformer_blocks"))
        (transformer,) = spatial.transformer_blocks
        for i, attention in ((2 * n, transformer.attn1), (2 * n + 1, transformer.attn2)):
            for key in ("to_q", "to_k", "to_v", "to_out"):
                linear = attention.to_out[0] if key == "to_out" else getattr(attention, key)
                down, up = (tree["ip_adapter"][f"{i}.{key}_lora.{part}.weight"] for part in ("down", "up"))
                linear.weight.data += strength * up @ down
    return model


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.mark.parametrize("variant", KINDS)
def test_is_the_papers_attention_with_the_files_lora(model, variant):
    tree, adapter = load(variant)
    under = merged(tree) if "faceid" in variant else toy.model()
    hand = by_hand(under, tree, e_of(variant, tree, face()), e_of(variant, tree))
    before = toy.sample(model)
    out = toy.sample(steered(model, adapter))
    assert near(out, toy.sample(hand), 1e-4) and not near(out, before, 1e-2)
    assert torch.equal(toy.sample(model), before)


def test_structure_and_lora_strength(model):
    tree, adapter = load("faceid-plus v2")
    hand = by_hand(merged(tree, 0.4), tree, *(e_of("faceid-plus v2", tree, f, 0.3) for f in (face(), None)))
    out = toy.sample(steered(model, adapter, structure=0.3, lora_strength=0.4))
    assert near(out, toy.sample(hand), 1e-4)
    without = by_hand(model, tree, *(e_of("faceid-plus v2", tree, f) for f in (face(), None)))
    assert near(toy.sample(steered(model, adapter, lora_strength=0.0)), toy.sample(without))


def test_several_faces_and_one_for_each_item(model):
    tree, adapter = load("portrait")
    two = face(2)
    hand = by_hand(model, tree, e_of("portrait", tree, two).reshape(1, 32, -1), None)
    assert near(toy.sample(steered(model, adapter, two, unconditional="none")), toy.sample(hand))
    start = toy.noise(batch=2)
    out = toy.sample(steered(model, adapter, two, combine="one each"), start=start)
    one = toy.sample(steered(model, adapter, two.embedding[1:]), start=start[1:])
    assert near(out[1:], one)


def test_a_second_person_does_not_add_the_lora_again(model):
    """Two faces under masks, one file: its LoRA counts once."""
    tree, adapter = load("faceid")
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    masks = [m.repeat_interleave(8, 0).repeat_interleave(8, 1)[None] for m in (left, 1 - left)]
    first, second = face(seed=1), face(seed=2)
    both = steered(steered(model, adapter, first, mask=masks[0]), adapter, second, mask=masks[1])
    hand = by_hand(merged(tree), tree, e_of("faceid", tree, first), e_of("faceid", tree), mask=left)
    hand = by_hand(hand, tree, e_of("faceid", tree, second), e_of("faceid", tree), mask=1 - left)
    assert near(toy.sample(both), toy.sample(hand), 1e-4)
    late = steered(steered(model, adapter, first, lora_strength=0.0, mask=masks[0]), adapter, second, mask=masks[1])
    assert near(toy.sample(late), toy.sample(hand), 1e-4)


def test_a_raw_embedding_and_a_crop_of_ones_own(model):
    _, adapter = load("faceid-plus v2")
    its = face()
    out = toy.sample(steered(model, adapter, its.embedding[0], crop=its.crop(224)))
    assert near(out, toy.sample(steered(model, adapter, its)))


@pytest.mark.parametrize("options", [dict(strength=0.0), dict(schedule=Schedule(0.5, 0.5))], ids=["strength", "window"])
def test_off_is_no_node_and_no_lora(model, options):
    off = steered(model, load("faceid")[1], **options)
    assert not off.get_wrappers(WrappersMP.OUTER_SAMPLE, "steer") and not off.patches
    assert torch.equal(toy.sample(off), toy.sample(model))


def test_bad_input_raises_before_sampling(model):
    (_, plus), (_, picture) = load("faceid-plus v1"), load("plus")
    raw = face().embedding
    with toy.count_forwards(model) as count:
        for adapter, its, options, words in (
            (picture, None, {}, "plus-0.safetensors is IP-Adapter plus; use SteerIPAdapter for it"),
            (plus, None, dict(strength=-1.0), "strength -1.0 must be"),
            (plus, None, dict(structure=-1.0), "structure -1.0 must be"),
            (plus, None, dict(clip_vision=None), "looks at the face too: wire clip_vision. It needs an image encoder"),
            (plus, None, dict(clip_vision=encoder(hidden_size=64)), "; wired is another encoder, where it is 64"),
            (plus, raw, {}, "the face comes without its picture"),
            (plus, raw[:, :128], {}, "takes face embeddings of width 512, and this one has 128"),
            (plus, "who", {}, "face is str; wire SteerFace"),
            (plus, raw, dict(crop=pictures(2)), "there are 1 faces and 2 crops"),
        ):
            with pytest.raises(ValueError, match=f"SteerFaceID: .*{words}"):
                toy.sample(steered(model, adapter, its, **options))
    assert count.calls == 0
