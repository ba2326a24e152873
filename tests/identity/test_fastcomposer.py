"""FastComposer against the official code written out: subject words, delayed conditioning, the file's own networks."""

import pytest
import torch
import toy
from attention.by_hand import near
from comfy.utils import unet_to_diffusers
from identity import oracle, oracle_fuse
from steer.models.identity import adapter as files
from steer.models.lab.load import TEXT, load_clip
from steer.patches.identity import fastcomposer

WIDTH = TEXT["hidden_size"]
UNET = dict(toy.UNET, context_dim=WIDTH)
PROMPT = "a man with a red hat and a woman with glasses, blue background"
NEGATIVE = toy.text(2, width=WIDTH)


@pytest.fixture(scope="module")
def clip():
    return load_clip()


@pytest.fixture(scope="module")
def model():
    return toy.model(UNET)


def load(extra=None):
    sd = oracle_fuse.fastcomposer(WIDTH)
    return sd, files.from_state_dict({**sd, **(extra or {})}, "pytorch_model.bin")


def pictures(n=2, h=28, w=28):
    return torch.rand(n, h, w, 3, generator=torch.Generator().manual_seed(3))


def made(model, clip, adapter, images=None, text=PROMPT, subjects="man, woman", merge=0.0):
    images = pictures() if images is None else images
    return fastcomposer.apply(model, clip, adapter, images, text, subjects, merge)


def official(clip, sd, columns, images, text=PROMPT):
    cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    cond = cond.clone()
    e = oracle_fuse.fastcomposer_ids(sd, images)
    cond[0, columns] = oracle_fuse.fused(oracle_fuse.below("postfuse_module.", sd), cond[0, columns], e)
    return cond, pooled


@pytest.mark.parametrize("subjects, columns", [("man, woman", [2, 9]), ("Woman\nman", [9, 2]), ("red hat, #9", [6, 9])])
def test_each_subject_gets_its_picture(model, clip, subjects, columns):
    sd, adapter = load()
    assert (adapter.kind, adapter.tokens, adapter.width) == ("FastComposer", 1, WIDTH)
    ours, text, ((cond, options),) = made(model, clip, adapter, subjects=subjects)
    expected, pooled = official(clip, sd, columns, pictures())
    assert near(cond, expected) and near(options["pooled_output"], pooled)
    assert not ours.patches and not text.patcher.patches


def test_a_name_twice_is_the_next_place(model, clip):
    sd, adapter = load()
    text = "a man beside a man"
    _, _, ((cond, _),) = made(model, clip, adapter, text=text, subjects="man, man")
    assert near(cond, official(clip, sd, [2, 5], pictures(), text)[0])


def test_the_whole_picture_is_seen(model, clip):
    """In a black square, as the official transforms have it."""
    sd, adapter = load()
    wide = pictures(2, 16, 28)
    square = torch.zeros(2, 28, 28, 3)
    square[:, 6:22] = wide
    _, _, ((cond, _),) = made(model, clip, adapter, wide)
    assert near(cond, official(clip, sd, [2, 9], square)[0])


def test_delayed_conditioning(model, clip):
    """Two runs of the steps before and after, with one conditioning each."""
    _, adapter = load()
    both, delayed = made(model, clip, adapter)[2], made(model, clip, adapter, merge=0.3)[2]
    alone = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    sigmas = toy.sigmas(model, 6)
    k = int((sigmas >= model.get_model_object("model_sampling").percent_to_sigma(0.3)).sum())
    assert 0 < k < 5
    middle = toy.sample(model, positive=alone, negative=NEGATIVE, sigmas=sigmas[: k + 1])
    expected = toy.sample(
        model, positive=both, negative=NEGATIVE, sigmas=sigmas[k:], latent=middle, start=torch.zeros_like(middle)
    )
    out = toy.sample(model, positive=delayed, negative=NEGATIVE, sigmas=sigmas)
    always = toy.sample(model, positive=both, negative=NEGATIVE, sigmas=sigmas)
    assert near(out, expected) and not near(out, always, 1e-3)


def other_networks():
    """The weights of another toy UNet and another text encoder as the file has them, and both as MODEL and CLIP."""
    model, clip = toy.model(UNET, seed=9), load_clip()
    toy.random_weights(clip.cond_stage_model, 10)
    network = model.model.diffusion_model.state_dict()
    names = unet_to_diffusers(model.model.model_config.unet_config)
    sd = {f"unet.{name}": network[key] for name, key in names.items() if key in network}
    assert len(sd) == len(network)
    text = {key: w for key, w in clip.cond_stage_model.state_dict().items() if ".text_model." in key}
    sd |= {f"text_encoder.{key.split('.text_model.')[1]}": w for key, w in text.items()}
    return sd | {"text_encoder.embeddings.position_ids": torch.arange(77)[None]}, model, clip


def test_the_files_own_networks_take_the_place_of_the_models(model, clip):
    extra, unet, text = other_networks()
    sd, adapter = load(extra)
    assert "weights of the UNet and the text encoder" in str(adapter)
    before = toy.sample(model, positive=NEGATIVE, negative=NEGATIVE)
    kept = clip.encode_from_tokens(clip.tokenize(PROMPT))
    ours, tuned, positive = made(model, clip, adapter)
    assert near(positive[0][0], official(text, sd, [2, 9], pictures())[0])
    assert near(tuned.encode_from_tokens(tuned.tokenize("a cat")), text.encode_from_tokens(text.tokenize("a cat")))
    out = toy.sample(ours, positive=positive, negative=NEGATIVE)
    assert near(out, toy.sample(unet, positive=positive, negative=NEGATIVE))
    assert not near(out, toy.sample(model, positive=positive, negative=NEGATIVE), 1e-2)
    assert torch.equal(toy.sample(model, positive=NEGATIVE, negative=NEGATIVE), before)
    assert torch.equal(clip.encode_from_tokens(clip.tokenize(PROMPT)), kept)


def test_bad_input_is_told(model, clip):
    (_, adapter), extra = load(), other_networks()[0]
    larger = load({**extra, "unet.conv_in.weight": torch.ones(320, 4, 3, 3)})[1]
    more = load({**extra, "text_encoder.encoder.layers.11.mlp.fc1.weight": torch.ones(2, 2)})[1]
    plus = files.from_state_dict(oracle.flat(oracle.file("plus")), "plus.bin")
    for which, options, words in (
        (adapter, dict(subjects="man, dog"), '"dog" is not in the prompt'),
        (adapter, dict(subjects="man"), "there are 1 subjects and 2 pictures"),
        (adapter, dict(subjects="man, man"), '"man" is named 2 times, and the prompt has it 1 times'),
        (adapter, dict(subjects="hat, red hat"), "end in the same word"),
        (adapter, dict(merge=-0.1), "merge -0.1 must be"),
        (larger, {}, "brings weights of unet that this model does not have"),
        (more, {}, "brings weights of text_encoder that this model does not have"),
        (plus, {}, "plus.bin is IP-Adapter plus; use SteerIPAdapter for it"),
    ):
        with pytest.raises(ValueError, match=f"^SteerFastComposer: .*{words}"):
            made(model, clip, which, **options)
    with pytest.raises(ValueError, match="is for a text of width 128, and this text encoder makes 256"):
        made(model, oracle_fuse.clip(), adapter)
