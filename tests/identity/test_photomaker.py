"""PhotoMaker against the official code written out: where the word is, what it becomes, when, and the file's LoRA."""

import pytest
import torch
import toy
from attention.by_hand import near
from identity import oracle, oracle_fuse
from identity.by_hand import ORDER
from steer.models.identity import adapter as files
from steer.patches.identity import photomaker
from steer.patches.shared.face import Face

UNET = dict(toy.UNET, context_dim=oracle_fuse.TEXT)
PROMPT = "a photo of a woman img, wearing a hat"
NEGATIVE = toy.text(2, width=oracle_fuse.TEXT)


@pytest.fixture(scope="module")
def clip():
    return oracle_fuse.clip()


@pytest.fixture(scope="module")
def model():
    return toy.model(UNET)


def load(version, lora=True):
    tree = oracle_fuse.photomaker(version)
    sd = oracle.flat(tree if lora else {"id_encoder": tree["id_encoder"]})
    return tree, files.from_state_dict(sd, f"photomaker-v{version}.bin")


def pictures(n, seed=0):
    return torch.rand(n, 28, 28, 3, generator=torch.Generator().manual_seed(seed))


def face(n):
    return Face(20 * oracle.rand(n, 512, seed=5))


def made(model, clip, adapter, n=2, text=PROMPT, trigger="img", merge=0.0, lora_strength=1.0, faces=None):
    faces = face(n) if adapter.face and faces is None else faces
    return photomaker.apply(model, clip, adapter, pictures(n), text, trigger, merge, lora_strength, faces)


def ids_of(clip, text):
    return clip.tokenizer.clip_l.tokenizer(text)["input_ids"][1:-1]


def encoded(clip, ids, weights=None):
    """(cond, pooled) of token ids, in pieces of 75 as CLIP sees them."""
    tokens = {}
    for name, pad in (("l", 49407), ("g", 0)):
        tokens[name] = []
        for i in range(0, max(len(ids), 1), 75):
            part = [(t, (weights or {}).get(i + j, 1.0)) for j, t in enumerate(ids[i : i + 75])]
            part = [(49406, 1.0), *part, (49407, 1.0)]
            tokens[name].append(part + [(pad, 1.0)] * (77 - len(part)))
    return clip.encode_from_tokens(tokens, return_pooled=True)


def official(clip, tree, text, n, version, weights=None):
    """(cond, pooled): the token before the trigger, once for each of the pictures' words, then fused."""
    ids, img = ids_of(clip, text), ids_of(clip, "img")[0]
    at = ids.index(img) - 1
    count = n * version
    ids = ids[:at] + ids[at : at + 1] * count + ids[at + 2 :]
    cond, pooled = encoded(clip, ids, {at + i: weights for i in range(count)} if weights else None)
    columns = [i // 75 * 77 + 1 + i % 75 for i in range(at, at + count)]
    e = oracle_fuse.photomaker_ids(tree["id_encoder"], pictures(n), face(n).embedding if version == 2 else None)
    sd = oracle_fuse.below("fuse_module.", tree["id_encoder"])
    cond[0, columns] = oracle_fuse.fused(sd, cond[0, columns], e)
    return cond, pooled


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("version", [1, 2])
def test_the_word_becomes_the_pictures(model, clip, version, n):
    tree, adapter = load(version)
    assert (adapter.kind, adapter.tokens, adapter.face) == (f"PhotoMaker v{version}", version, 512 * (version - 1))
    _, ((cond, options),) = made(model, clip, adapter, n)
    expected, pooled = official(clip, tree, PROMPT, n, version)
    assert near(cond, expected) and near(options["pooled_output"], pooled)
    plain, _ = encoded(clip, ids_of(clip, PROMPT.replace(" img", "")))
    assert torch.equal(cond[:, :5], plain[:, :5]) and not near(cond[:, 5], plain[:, 5], 0.1)


@pytest.mark.parametrize("text, like, weight", [
    ("a photo of a supercalifragilistic businesswoman img at night", None, None),  # words of several tokens
    ("a (photo:1.0),\nof\na\nwoman img\nwith a hat", "a photo, of a woman img with a hat", None),
    ("a photo of a (woman img:1.2), smiling", "a photo of a woman img, smiling", 1.2),
    ("a photo of a (woman:1.2) img, smiling", "a photo of a woman img, smiling", 1.2),
    ("a photo of a woman (img:1.2), smiling", "a photo of a woman img, smiling", None),
    ("very " * 80 + "old woman img in a park", None, None),  # in the second piece
    ("very " * 72 + "old woman img in a park", None, None),  # the pictures' words are in two pieces
], ids=["words of several tokens", "newlines", "weight", "weight of the word", "weight of the trigger", "long",
        "across pieces"])
def test_the_word_is_found_by_its_tokens(model, clip, text, like, weight):
    tree, adapter = load(2)
    _, ((cond, _),) = made(model, clip, adapter, text=text)
    expected, _ = official(clip, tree, like or text, 2, 2, weight)
    assert near(cond, expected)


def test_a_trigger_of_several_tokens(model, clip):
    tree, adapter = load(1)
    assert len(ids_of(clip, "photomaker")) > 1
    _, ((cond, _),) = made(model, clip, adapter, text=PROMPT.replace("img", "photomaker"), trigger=" photomaker ")
    assert near(cond, official(clip, tree, PROMPT, 2, 1)[0])


def test_merged_after_a_share_of_the_steps(model, clip):
    """Two runs of the steps before and after, with one prompt each."""
    _, adapter = load(1, lora=False)
    _, both = made(model, clip, adapter)
    _, delayed = made(model, clip, adapter, merge=0.5)
    alone = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT.replace(" img", "")))
    sampling, sigmas = model.get_model_object("model_sampling"), toy.sigmas(model, 6)
    k = int((sigmas >= sampling.percent_to_sigma(0.5)).sum())
    assert 1 < k < 5
    # the steps before end in the middle, from where those after go on without noise
    middle = toy.sample(model, positive=alone, negative=NEGATIVE, sigmas=sigmas[: k + 1])
    expected = toy.sample(
        model, positive=both, negative=NEGATIVE, sigmas=sigmas[k:], latent=middle, start=torch.zeros_like(middle)
    )
    out = toy.sample(model, positive=delayed, negative=NEGATIVE, sigmas=sigmas)
    always = toy.sample(model, positive=both, negative=NEGATIVE, sigmas=sigmas)
    assert near(out, expected) and not near(out, always, 1e-2)
    _, ((cond, options),) = made(model, clip, adapter, merge=1.0)
    assert torch.equal(cond, alone[0][0]) and "start_percent" not in options


def merged(tree, strength):
    """A toy model with the file's LoRA in its weights."""
    model = toy.model(UNET)
    network = model.model.diffusion_model
    groups = {"input": network.input_blocks, "output": network.output_blocks, "middle": [network.middle_block]}
    for (group, index), (name, _) in zip(ORDER, oracle_fuse.BLOCKS, strict=True):
        (spatial,) = (m for m in groups[group][index] if hasattr(m, "transformer_blocks"))
        (block,) = spatial.transformer_blocks
        for key, layer in (("attn1.processor.to_q", block.attn1.to_q), ("attn2.processor.to_k", block.attn2.to_k),
                           ("attn1.processor.to_out", block.attn1.to_out[0])):
            lora = f"unet.{name}.transformer_blocks.0.{key}_lora"
            down, up = (tree["lora_weights"][f"{lora}.{part}.weight"] for part in ("down", "up"))
            layer.weight.data += strength * up @ down
    return model


@pytest.mark.parametrize("form", ["official", "newer diffusers"])
def test_the_files_lora(model, clip, form):
    tree, adapter = load(1)
    if form != "official":
        lora = tree["lora_weights"]
        for old, new in ((".processor", ""), ("to_out_lora", "to_out.0_lora"), ("_lora.down.", ".lora_A."),
                         ("_lora.up.", ".lora_B.")):
            lora = {key.replace(old, new): w for key, w in lora.items()}
        adapter = files.from_state_dict(oracle.flat({**tree, "lora_weights": lora}), "photomaker.bin")
    before = toy.sample(model, positive=NEGATIVE, negative=NEGATIVE)
    for strength in (1.0, 0.4):
        ours, positive = made(model, clip, adapter, lora_strength=strength)
        out = toy.sample(ours, positive=positive, negative=NEGATIVE)
        hand = toy.sample(merged(tree, strength), positive=positive, negative=NEGATIVE)
        assert near(out, hand, 1e-4) and not near(out, toy.sample(model, positive=positive, negative=NEGATIVE), 1e-3)
    twice = made(ours, clip, adapter)[0]  # once, with the first strength
    assert torch.equal(toy.sample(twice, positive=positive, negative=NEGATIVE), out)
    assert made(model, clip, adapter, lora_strength=0.0)[0] is model
    assert torch.equal(toy.sample(model, positive=NEGATIVE, negative=NEGATIVE), before)


def test_bad_input_is_told(model, clip):
    (_, one), (_, two) = load(1), load(2)
    plus = files.from_state_dict(oracle.flat(oracle.file("plus")), "plus.bin")
    for adapter, options, words in (
        (one, dict(text="a woman"), 'the trigger "img" is not in the prompt; write it after the word for the person'),
        (one, dict(text="a woman imgs"), 'the trigger "img" is not in'),
        (one, dict(text="img of a woman"), 'the trigger "img" begins the prompt'),
        (one, dict(text="a man img and a woman img"), 'the trigger "img" is 2 times in the prompt'),
        (one, dict(trigger=" "), "is not in the prompt"),
        (two, dict(faces=face(3)), "there are 2 pictures and 3 faces"),
        (two, dict(faces=face(2).embedding[:, :128]), "takes face embeddings of width 512, and this one has 128"),
        (one, dict(merge=1.5), "merge 1.5 must be"),
        (plus, {}, "plus.bin is IP-Adapter plus; use SteerIPAdapter for it"),
    ):
        with pytest.raises(ValueError, match=f"^SteerPhotoMaker: .*{words}"):
            made(model, clip, adapter, **options)
    with pytest.raises(ValueError, match="SteerPhotoMaker: .* takes the face's embedding too: wire face"):
        photomaker.apply(model, clip, two, pictures(1), PROMPT, "img", 0.0, 1.0)
    with pytest.raises(ValueError, match="the LoRA of photomaker-v1.bin is for 21 weights, of which this model has 0"):
        made(toy.flux(), clip, one)
    sd = oracle.flat(oracle_fuse.photomaker(1))
    del sd["id_encoder.fuse_module.mlp1.fc2.weight"]
    with pytest.raises(ValueError, match="cut.bin looks cut short: it has no 'fc2.weight'"):
        files.from_state_dict(sd, "cut.bin")
    with pytest.raises(ValueError, match='p.bin is no IP-Adapter and cannot be "plus-face"'):
        files.from_state_dict(oracle.flat(oracle_fuse.photomaker(1)), "p.bin", "plus-face")
