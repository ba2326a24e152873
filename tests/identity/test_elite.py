"""ELITE against the official code written out: the word of a picture, keys and values, the object's details."""

import pytest
import torch
import toy
from attention.by_hand import near
from identity import oracle, oracle_elite
from identity.by_hand import ORDER, encoder
from steer.models.identity import adapter as files
from steer.models.lab.load import TEXT, load_clip
from steer.patches.guidance import pag
from steer.patches.identity import elite
from steer.patches.shared.schedule import Schedule

WIDTH = TEXT["hidden_size"]
PROMPT, COLUMN = "a photo of a s on the beach", 5
NEGATIVE = toy.text(2, width=WIDTH)
ALWAYS = Schedule()
SIDE = 28


@pytest.fixture(scope="module")
def clip():
    return load_clip()


@pytest.fixture(scope="module")
def model():
    return toy.model(dict(toy.UNET, context_dim=WIDTH))


@pytest.fixture(scope="module")
def vision():
    return encoder(hidden_size=oracle_elite.STATES, num_hidden_layers=18)


def load(seed=0, name="global_mapper.pt", dtype=torch.float32):
    sd = oracle_elite.mapper(WIDTH, seed)
    given = {key: value.to(dtype) for key, value in reversed(sd.items())}
    return sd, files.from_state_dict(given, name)


def picture(n=1, side=SIDE):
    return torch.rand(n, side, side, 3, generator=torch.Generator().manual_seed(4))


def half():
    """A mask of the picture: its left half, and a corner."""
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    mask[:, :6] = 0.3
    return mask


def made(model, clip, vision, adapter, local=None, image=None, text=PROMPT, word="s", strength=0.8, schedule=ALWAYS,
         **options):
    image = picture() if image is None else image
    return elite.apply(model, clip, adapter, vision, image, text, word, strength, schedule, local, **options)


def draw(model, positive, negative=NEGATIVE, **options):
    return toy.sample(model, positive=positive, negative=negative, **{"steps": 2, **options})


def e_of(vision, sd, mask=None):
    mask = torch.ones(1, SIDE, SIDE) if mask is None else (mask > 0).float()
    return oracle_elite.details(sd, oracle_elite.seen(vision, picture() * mask[..., None]), mask[0])


def test_files_are_known_whatever_their_order():
    sd, adapter = load()
    assert (adapter.kind, adapter.nodes, adapter.hidden) == ("ELITE", ("SteerELITE",), oracle.HIDDEN)
    assert (adapter.width, adapter.image) == (WIDTH, oracle_elite.STATES) and "global or the local" in str(adapter)
    first, last = "down_blocks_0_attentions_0", "mid_block_attentions_0"
    for n, block in ((0, first), (-1, last)):
        assert torch.equal(adapter.weights[n]["to_v_ip"], sd[f"{block}_transformer_blocks_0_attn2_to_v.weight"])
    del sd["mapping_patch_3.6.weight"]
    with pytest.raises(ValueError, match="^x.pt looks cut short: it has no '6.weight'"):
        files.from_state_dict(sd, "x.pt")


def test_the_picture_is_a_word(model, clip, vision):
    """As if the text encoder's table had it in the place of the word."""
    sd, adapter = load()
    states = elite.states_of(vision, picture())
    expected = oracle_elite.seen(vision, picture())
    assert all(near(states[:, i], x) for i, x in enumerate(expected))
    _, ((cond, options),) = made(model, clip, vision, adapter)
    other = load_clip()
    table = other.cond_stage_model.clip_l.transformer.get_input_embeddings()
    token = clip.tokenize("s")["l"][0][1][0]
    table.weight = torch.nn.Parameter(table.weight.detach().float(), requires_grad=False)  # the file's are of half
    table.weight[token] = oracle_elite.word(sd, expected)
    own, pooled = other.encode_from_tokens(other.tokenize(PROMPT), return_pooled=True)
    assert near(cond, own) and near(options["pooled_output"], pooled)
    assert not near(cond, clip.encode_from_tokens(clip.tokenize(PROMPT)), 1e-2)


def test_keys_values_and_details(model, clip, vision):
    (sd, adapter), (lsd, local) = load(), load(50, "local_mapper.pt")
    _, positive = made(model, clip, vision, adapter)
    before = draw(model, positive)
    where = torch.zeros(1, 128, 128)
    where[:, :, :56] = 1
    for ours, e, options in (
        (dict(), None, {}),
        (dict(local=local), e_of(vision, lsd), {}),
        (dict(local=local, object_mask=half(), strength=1.3), e_of(vision, lsd, half()), dict(strength=1.3)),
        (dict(local=local, mask=where), e_of(vision, lsd), dict(mask=where[0, ::8, ::8])),
    ):
        steered, its = made(model, clip, vision, adapter, **ours)
        assert torch.equal(its[0][0], positive[0][0])
        hand = oracle_elite.by_hand(model, sd, lsd, e, COLUMN, ORDER, **options)
        out = draw(steered, positive)
        assert near(out, draw(hand, positive)) and not near(out, before, 1e-2), ours
    assert torch.equal(draw(model, positive), before)


def test_without_details_nothing_of_the_local_mapper_is_there(model, clip, vision):
    (_, adapter), (_, local) = load(), load(50, "local_mapper.pt")
    steered, positive = made(model, clip, vision, adapter)
    alone = draw(steered, positive)
    for options in (dict(strength=0.0), dict(schedule=Schedule(0.5, 0.5)), dict(mask=torch.zeros(1, 64, 64))):
        assert torch.equal(draw(made(model, clip, vision, adapter, local, **options)[0], positive), alone)
    assert torch.equal(draw(made(model, clip, vision, adapter, local, schedule=Schedule(1.0, 1.0))[0], positive), alone)


def test_batches_and_prompts_of_unequal_length(model, clip, vision):
    """Each item has its own largest share of the word; repeated text changes none."""
    (sd, adapter), (lsd, local) = load(), load(50, "local_mapper.pt")
    steered, positive = made(model, clip, vision, adapter, local)
    start = toy.noise(batch=2)
    both = draw(steered, positive, start=start)
    for i in range(2):
        assert near(both[i : i + 1], draw(steered, positive, start=start[i : i + 1]))
    hand = oracle_elite.by_hand(model, sd, lsd, e_of(vision, lsd), COLUMN, ORDER)
    for tokens in (154, 331):  # in one forward, and in two
        given = dict(negative=toy.text(2, tokens=tokens, width=WIDTH))
        assert near(draw(steered, positive, **given), draw(hand, positive, **given))


def test_half_precision_and_another_node(model, clip, vision):
    (_, adapter), (_, local) = load(), load(50, "local_mapper.pt")
    steered, positive = made(model, clip, vision, adapter, local)
    small, tiny = load(dtype=torch.bfloat16)[1], load(50, "local_mapper.pt", torch.bfloat16)[1]
    bf16 = toy.model(dict(toy.UNET, context_dim=WIDTH), dtype=torch.bfloat16)
    out = draw(made(bf16, clip, vision, small, tiny)[0], positive, steps=1)
    assert out.isfinite().all() and near(out, draw(steered, positive, steps=1), 0.1)
    guided = draw(pag.apply(steered, 2.0, "middle", ALWAYS), positive)
    assert guided.isfinite().all() and not near(guided, draw(steered, positive), 1e-3)


def test_bad_input_is_told(model, clip, vision):
    (_, adapter), (_, local) = load(), load(50, "local_mapper.pt")
    plus = files.from_state_dict(oracle.flat(oracle.file("plus")), "plus.bin")
    few = encoder(hidden_size=oracle_elite.STATES, num_hidden_layers=12)
    for args, options, words in (
        ((model, clip, vision, plus), {}, "plus.bin is IP-Adapter plus; use SteerIPAdapter for it"),
        ((model, clip, vision, local), {}, "the mappers are crossed: adapter takes the global one"),
        ((model, clip, vision, adapter, adapter), {}, "the mappers are crossed"),
        ((model, clip, encoder(), adapter), {}, "global_mapper.pt needs an image encoder"),
        ((model, clip, few, adapter), {}, "clip_vision has 12 layers; ELITE was trained with CLIP ViT-L/14"),
        ((toy.model(), clip, vision, adapter), {}, "this model has 7 to a text of width 64"),
        ((model, clip, vision, adapter), dict(word="cat"), '"cat" is not in the prompt'),
        ((model, clip, vision, adapter), dict(word="a"), '"a" is 2 tokens of the prompt'),
        ((model, clip, vision, adapter), dict(image=picture(2)), "image has 2 pictures; ELITE takes one"),
        ((model, clip, vision, adapter), dict(strength=-1.0), "strength -1.0 must be"),
        ((model, clip, vision, adapter, local), dict(object_mask=torch.ones(1, 9, 9)), r"object_mask is \(1, 9, 9\)"),
    ):
        with pytest.raises(ValueError, match=f"^SteerELITE: .*{words}"):
            made(*args, **options)
    steered, _ = made(model, clip, vision, adapter, local)
    with pytest.raises(ValueError, match="SteerELITE: another prompt is wired"):
        draw(steered, toy.text(1, tokens=4, width=WIDTH), negative=toy.text(2, tokens=4, width=WIDTH))
