"""Words and columns with the host's own tokenizers, and what of one prompt stands for what of another."""

from functools import cache

import comfy.sd
import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.sdxl_clip import SDXLTokenizer
from comfy.text_encoders.flux import FluxTokenizer
from comfy.text_encoders.qwen_image import QwenImageTokenizer
from comfy.text_encoders.sd3_clip import SD3ClipModel, SD3Tokenizer
from comfy.text_encoders.z_image import ZImageTokenizer
from steer.models.lab.load import load_clip
from steer.patches.shared.alignment import align
from steer.patches.shared.words import encode, read

TOKENIZERS = {
    "sd1": (SD1Tokenizer, None), "sdxl": (SDXLTokenizer, 77), "flux": (FluxTokenizer, 256), "sd3": (SD3Tokenizer, 154),
    "sd3 without t5": (SD3Tokenizer, 77), "qwen": (QwenImageTokenizer, None), "z-image": (ZImageTokenizer, None),
}


@cache
def clip(name):
    """The host's CLIP with a tokenizer and no network."""
    made = comfy.sd.CLIP(no_init=True)
    made.tokenizer, made.tokenizer_options = TOKENIZERS[name][0](), {}
    if name.startswith("sd3"):
        made.cond_stage_model = SD3ClipModel(True, True, name == "sd3", device="meta")
    return made


def prompt(name, text):
    columns = TOKENIZERS[name][1]
    if columns is None:
        (chunks,) = clip(name).tokenize(text).values()
        columns = sum(map(len, chunks)) - 34 * (name == "qwen")  # its encoder drops the template before the prompt
    return read(clip(name), text, columns)


def said(made, name, columns):
    """What the tokens in these columns say, by the tokenizer's own decoder; of each encoder in turn."""
    every = clip(name).tokenize(made.text)
    order = [k for k in every if k not in ("l", "g")] if name in ("flux", "qwen", "z-image") else ["l", *(
        k for k in every if k == "t5xxl" and made.columns > 77)]
    flat = [(k, token) for k in order for chunk in every[k] for token, _ in chunk][-made.columns :]
    parts = []
    for k in order:
        sub = getattr(clip(name).tokenizer, k, None) or getattr(clip(name).tokenizer, f"clip_{k}")
        parts.append(sub.decode([flat[c][1] for c in columns if flat[c][0] == k]).replace(" ", "").lower())
    return parts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_words_columns_hold_its_tokens(name):
    text = "A photo of a Reddishorange top-hat,\nnot a cafe; a zebrafish (and a dog)"
    made = prompt(name, text)
    assert made.words == ["a", "photo", "of", "a", "reddishorange", "top", "hat", "not", "a", "cafe", "a", "zebrafish",
                          "and", "a", "dog"]
    encoders = 2 if name == "sd3" else 1
    for word in ("photo", "reddishorange", "zebrafish", "dog", "cafe"):
        assert [part.strip("()") for part in said(made, name, made.find(word))] == [word] * encoders
    assert len(made.find("a")) >= 5 * encoders
    assert made.find("#5") == made.find("reddishorange")
    assert set(made.find("Top Hat")) == set(made.find("top")) | set(made.find("hat"))
    assert set(made.find("dog, photo")) == set(made.find("dog")) | set(made.find("photo"))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_weights_and_several_pieces(name):
    text = "a (blue:1.3) (cat)\nand " + "very " * 260 + "(((small))) dog"
    (columns,) = {sum(map(len, chunks)) for key, chunks in clip(name).tokenize(text).items()
                  if key == "t5xxl" or name != "flux"}
    made = read(clip(name), text, columns)
    assert made.words == ["a", "blue", "cat", "and", *["very"] * 260, "small", "dog"]
    for word in ("blue", "cat", "small", "dog"):
        assert said(made, name, made.find(word)) == [word]
    assert len(made.streams[0].padding) == (columns // 77 if name != "flux" else 1)
    tokens = [c for c, _ in made.streams[0].tokens]
    assert sorted(tokens + [c for a, b in made.streams[0].padding for c in range(a, b)]) == list(range(columns))


def test_other_scripts_and_numbers():
    for name in ("qwen", "sd1"):
        made = prompt(name, "une café 1.5 猫坐, don't")
        assert made.words == ["une", "café", "1", "5", "猫", "坐", "don", "t"]
        assert made.find("猫") and made.find("café") and set(made.find("猫")).isdisjoint(made.find("café"))


def test_an_empty_prompt_has_no_words():
    for name in TOKENIZERS:
        made = prompt(name, "")
        assert made.words == [] and not any(columns for s in made.streams for _, columns in s.words)
        with pytest.raises(ValueError, match='"cat" is not in the prompt "", which has: no words'):
            made.find("cat")


def test_an_embedding_is_a_word():
    made = clip("sd1")
    tokens = made.tokenize("a cat", return_word_ids=True)
    vectors = [(torch.zeros(768), 1.0, 9)] * 2
    tokens["l"][0][3:5] = vectors
    from steer.patches.shared.words import _stream

    stream = _stream(made.tokenizer.clip_l, tokens["l"], made.tokenize("", return_word_ids=True)["l"], 0)
    assert stream.words == (("a", (1,)), ("cat", (2,)), ("embedding", (3, 4)))


def test_the_lab_encodes_as_it_is_read():
    """Where the meaning of a column changes with a word: of a causal encoder, from that word on."""
    lab = load_clip()
    (a, _), mine = encode(lab, "a happy person, blue hair")[0][0], encode(lab, "a happy person, blue hair")[1]
    b = encode(lab, "a happy person, red hair")[0][0][0]
    changed = (a - b).abs().amax((0, 2)) > 1e-5
    assert int(changed.nonzero()[0]) == mine.find("blue")[0]


def test_what_cannot_be_told_is_refused():
    for name, columns, counts in (("sd1", 100, "l 77"), ("flux", 512, "l 77, t5xxl 256"), ("sd3", 99, ".*t5xxl 77")):
        with pytest.raises(ValueError, match=rf"which of the {columns} columns .* \(tokens: {counts}\); use a text"):
            read(clip(name), "a cat", columns)
    with pytest.raises(ValueError, match="longer than its conditioning of 3 columns"):
        read(clip("qwen"), "a cat on a mat", 3)


def test_what_cannot_be_read_is_refused():
    made = prompt("sd1", "a cat on a (mat:1.2)\nat noon")
    for text, words in (
        ("dog", '"dog" is not in the prompt "a cat on a [^"]*", which has: a, cat, on, mat, at, noon'),
        ("#9", '"#9" is not'), ("#0", '"#0" is not'), ("cat mat", '"cat mat" is not'), ("!", '"!" is not'),
    ):
        with pytest.raises(ValueError, match=words):
            made.find(text)
    for text in ("cat", "cat: much", "cat: nan", "cat: inf", ": 2"):
        with pytest.raises(ValueError, match=f'weight "{text.strip()}" cannot be read; write it as in'):
            made.weights(text)
    weights = made.weights("cat: 1.5,\nmat: -0.5")
    assert [weights[list(made.find(w))].tolist() for w in ("cat", "mat", "noon")] == [[1.5], [-0.5], [1.0]]
    assert torch.equal(made.weights(""), torch.ones(77))


def aligned(name, before, after, operation, pairs=""):
    return align(prompt(name, before), prompt(name, after), operation, pairs)


@pytest.mark.parametrize("operation", ["refine", "replace", "reorder"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_stands_for_itself(name, operation):
    for text in ("a cat, a dog and a reddishorange cat; the end", "", "a cat\nand " + "very " * 90 * (name == "sd1")):
        same = aligned(name, text, text, operation)
        assert torch.equal(same.M, torch.eye(len(same.M))) and bool((same.alpha == 1).all())


def pairs_of(made):
    """{target word number: source word numbers}, for the first encoder."""
    s, t = made.source.streams[0].words, made.target.streams[0].words
    return {n: [i for i, (_, its) in enumerate(s) if made.M[list(its)][:, list(mine)].any()]
            for n, (_, mine) in enumerate(t)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_refine_keeps_what_both_have(name):
    """Words put in and left out, in one go."""
    made = aligned(name, "a photo of a small house on a hill", "a photo of a house on a hill at fall", "refine")
    # 0 a 1 photo 2 of 3 a 4 small 5 house 6 on 7 a 8 hill
    assert pairs_of(made) == {0: [0], 1: [1], 2: [2], 3: [3], 4: [5], 5: [6], 6: [7], 7: [8], 8: [], 9: []}
    assert not made.alpha[list(made.target.find("at, fall"))].any()
    assert not made.M[list(made.source.find("small"))].any()
    assert bool((made.M.sum(1)[[c for c in range(len(made.M)) if c not in made.source.find("small")]] == 1).all())
    assert str(made).splitlines()[4:] == [
        "#5 house <- #6 house", "#6 on <- #7 on", "#7 a <- #8 a", "#8 hill <- #9 hill", "#9 at <- (new)",
        "#10 fall <- (new)", "left out: #5 small",
    ]


def test_ties_are_the_papers():
    """Of equal alignments the one with the later pairs, as the paper's code traces back: new tokens first."""
    made = aligned("sd1", "a cat", "a cat a cat", "refine")
    assert pairs_of(made) == {0: [0], 1: [1], 2: [], 3: []}
    made = aligned("sd1", "a cat a cat", "a cat", "refine")
    assert pairs_of(made) == {0: [0], 1: [1]}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_replace_goes_word_by_word(name):
    made = aligned(name, "a zebrafish eats a burger.", "a cat eats a pizza.", "replace")
    assert pairs_of(made) == {n: [n] for n in range(5)}
    assert bool((made.alpha == 1).all())
    assert torch.allclose(made.M.sum(1), torch.ones(len(made.M)))  # no attention is lost
    # "cat" is one token, "zebrafish" several
    (_, s), (_, t) = made.source.streams[0].words[1], made.target.streams[0].words[1]
    assert torch.equal(made.M[list(s)][:, list(t)], torch.full((len(s), len(t)), 1 / len(t)))
    back = aligned(name, "a cat eats a pizza.", "a zebrafish eats a burger.", "replace")
    block = back.M[list(t)][:, list(s)]
    assert torch.equal(block, torch.eye(len(s)) if len(s) == len(t) else torch.full(block.shape, 1 / len(s)))
    assert torch.allclose(back.M.sum(1), torch.ones(len(back.M)))


def test_replace_needs_as_many_words():
    with pytest.raises(ValueError, match='have 2 and 3 words, and "replace" .* take "refine"'):
        aligned("sd1", "a cat", "a black cat", "replace")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_reorder_follows_words_and_the_map(name):
    before, after = "a red hat, a blue scarf", "in winter: a blue hat and a red scarf"
    made = aligned(name, before, after, "reorder")
    # 0 a 1 red 2 hat 3 a 4 blue 5 scarf
    assert pairs_of(made) == {0: [], 1: [], 2: [0], 3: [4], 4: [2], 5: [], 6: [3], 7: [1], 8: [5]}
    made = aligned(name, before, after, "reorder", "blue: red, #2: #4\nscarf: winter")
    assert pairs_of(made) == {0: [], 1: [5], 2: [0], 3: [1], 4: [2], 5: [], 6: [3], 7: [4], 8: [5]}
    for pairs, words in (
        ("blue", 'word_map "blue" cannot be read'), ("green: red", '"green" is not in the prompt "a red hat'),
        ("red: green", '"green" is not in the prompt "in winter'), ("a: red", "have it 2 and 1 times"),
    ):
        with pytest.raises(ValueError, match=words):
            aligned(name, before, after, "reorder", pairs)
    with pytest.raises(ValueError, match='word_map is for the operation "reorder", and the operation is "refine"'):
        aligned(name, before, after, "refine", "blue: red")
    with pytest.raises(ValueError, match="operation 'swap' is unknown; choose one of refine, replace, reorder"):
        aligned(name, before, after, "swap")


def test_prompts_of_unequal_pieces():
    """What the source has no piece for is new."""
    before, after = "a cat", "a cat and " + "very " * 100 + "small dog"
    short, long = read(clip("sd1"), before, 77), read(clip("sd1"), after, 154)
    made = align(short, long, "refine")
    assert made.M.shape == (77, 154) and pairs_of(made)[0] == [0] and pairs_of(made)[1] == [1]
    assert not made.alpha[list(long.find("small, dog"))].any()
    back = align(long, short, "refine")
    assert pairs_of(back) == {0: [0], 1: [1]} and bool((back.alpha == 1).all())
