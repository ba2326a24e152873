"""The lab's FastComposer is trained as the node applies it, and is a file of the public layout."""

import random

import comfy.sample
import pytest
import torch
from safetensors.torch import load_file
from steer.models.identity import adapter as files
from steer.models.lab import common, fastcomposer, load, persons
from steer.models.lab.captions import parse, phrases
from steer.models.lab.portrait import FACTORS, Portrait, draw
from steer.models.lab.reader import load_reader
from steer.patches.identity import fastcomposer as method


@pytest.fixture(scope="module")
def exported(work):
    """A trainer whose weights are all other than at first, and its file; in fp16 its weights are what they are."""
    made = fastcomposer.Trainer(work, name="adapter_by_hand")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            p.copy_((p + (0.02 if name.startswith("unet") else 0.2) * torch.randn(p.shape, generator=generator)).half())
    made.average = common.Average(made.model)
    made.export(work)
    return made, work / "adapter_by_hand.safetensors"


def test_is_trained_as_the_node_applies_it(exported, monkeypatch):
    """One step of the host with the node and the file, and the UNet as the training asks it."""
    trainer, path = exported
    adapter, model, clip = files.load(str(path)), load.load_unet(), load.load_clip()
    pair = trainer.portraits[:2]
    said = iter([["hat"], ["skin", "shirt"]])
    monkeypatch.setattr(fastcomposer, "told", lambda p, rng: (phrases(p, next(said)), p))
    monkeypatch.setattr(fastcomposer, "NO_TEXT", 0)
    monkeypatch.setattr(fastcomposer, "NO_IMAGE", 0)
    prompt = ", ".join([*phrases(pair[0], ["hat"]), *phrases(pair[1], ["skin", "shirt"])])
    pictures = torch.stack([torch.from_numpy(draw(p).copy()).float() / 255 for p in pair])
    steered, _, positive = method.apply(model, clip, adapter, pictures, prompt, persons.SUBJECTS, 0.0)
    noise = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(5))

    def host(model, positive):
        options = dict(steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", seed=0, disable_pbar=True)
        return comfy.sample.sample(
            model, noise, positive=positive, negative=positive, latent_image=torch.zeros_like(noise), **options
        )

    sampling = trainer.base.model_sampling
    sigma = sampling.sigma_max.view(1, 1, 1, 1)
    x = sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)
    with torch.no_grad():
        context, words = trainer.text([pair])
        assert words[0].tolist() == [0, 0] and len(words[1]) == 2
        x_in, options = sampling.calculate_input(sigma, x), trainer.watched(words, [])
        eps = trainer.unet(x_in, torch.tensor([999.0]), context, transformer_options=options)
    expected = trainer.base.latent_format.process_out(sampling.calculate_denoised(sigma, eps, x))
    out = host(steered, positive)
    assert (out - expected).abs().max() < 1e-2 * expected.std()
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    assert (host(steered, plain) - expected).abs().max() > 0.05 * expected.std()
    assert (host(model, positive) - expected).abs().max() > 0.05 * expected.std()


def test_the_file_and_the_word_at_first(work, exported):
    """What it holds; and before it is trained the fused word is nearly the word, whatever the picture."""
    keys = set(load_file(exported[1]))
    assert {"postfuse_module.mlp1.layernorm.weight", "postfuse_module.mlp2.fc2.bias",
            "image_encoder.visual_projection.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"} < keys
    assert {key.split(".")[0] for key in keys} == {"postfuse_module", "image_encoder", "unet"}
    assert all(".attentions." in key for key in keys if key.startswith("unet."))
    adapter = files.load(str(exported[1]))
    assert (adapter.nodes, adapter.width, adapter.size) == (("SteerFastComposer",), 128, 128)
    begun = fastcomposer.Trainer(work, name="none")
    rows = torch.tensor([begun.vocabulary.encode(["a portrait of a person", "a portrait of a person"])])
    assert (rows == begun.row).sum() == 2
    with torch.no_grad():
        words = begun.encoder(rows)[rows == begun.row]
        fused = begun.network.fuse(words, torch.randn(2, 128))
    assert (fused - words).norm() < 0.3 * words.norm()


def test_what_is_told():
    """The prompt is right about the portrait, the reference about all else."""
    rng, counts = random.Random(0), set()
    for seed in range(200):
        p = Portrait.from_seed(seed)
        parts, looked = fastcomposer.told(p, rng)
        said = parse(", ".join(parts))
        counts.add(len(said))
        assert all(getattr(p, name) == value for name, value in said.items()) and looked.geometry == p.geometry
        assert {n for n in FACTORS if getattr(looked, n) != getattr(p, n)} <= set(said)
    assert counts == set(range(fastcomposer.MOST + 1))


def test_the_judge_knows_whose_is_whose():
    """Wanted portraits are judged right, and the same with the halves swapped wrong."""
    scenes, prompts, images = case = persons.cases(6)
    assert all(text.count("person") == 2 for text in prompts)
    reader = load_reader()
    right = persons.truth(reader, load.load_vae(), case)
    assert right["obeyed"] == right["nearer"] == 1 and right["taken"] > 0.97 and right["mixed"] < 0.03
    assert right["identity"] > 0.8 and abs(right["other's"]) < 0.4
    pictures = images.flip(1).movedim(1, 2).flatten(2, 3).movedim(-1, 1)
    wrong = persons.judge(reader, pictures, scenes, images)
    assert wrong["mixed"] == 1 and wrong["nearer"] == 0 and wrong["other's"] > 0.99


def test_the_steps_of_its_training(work, monkeypatch, tmp_path, clock):
    """Every part is trained, and the training goes on where it stopped."""
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    begun = {k: v.clone() for k, v in fastcomposer.Trainer(work).model.state_dict().items()}
    fastcomposer.train(work, 3, batch=8)
    first = torch.load(work / "adapter_fastcomposer.ckpt", weights_only=True)
    assert first["step"] > 2
    assert [k for k, v in first["model"].items() if torch.equal(v, begun[k])] == []
    fastcomposer.train(work, 5, batch=8)
    again = torch.load(work / "adapter_fastcomposer.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 5
    weights = load_file(tmp_path / "adapter_fastcomposer.safetensors")
    assert torch.equal(weights["postfuse_module.mlp1.fc1.weight"], again["average"]["fuse.mlp1.fc1.weight"].half())


def test_where_the_words_are_looked_at(exported):
    """A word that all of the left half attends to and none of the right one belongs there, on every grid."""
    trainer, shares = exported[0], []
    words = torch.tensor([0, 0]), torch.tensor([3, 7])
    options = trainer.watched(words, shares)["patches_replace"]["attn2"]
    assert len(options) == len(trainer.blocks) > 3
    for high, size, swap in ((8, 64, False), (4, 96, False), (4, 96, True)):
        q, k = torch.zeros(1, high, 2 * high, size), torch.zeros(1, 9, size)
        q[:, :, :high, 0] = q[:, :, high:, 1] = 100.0
        k[:, 7 if swap else 3, 0] = k[:, 3 if swap else 7, 1] = 100.0
        attend = options[trainer.blocks[0]]
        out = attend(q.flatten(1, 2), k, torch.eye(9, size)[None], {"n_heads": 1})
        assert out.shape == (1, 2 * high * high, size)
        assert float(shares[-1]) == pytest.approx(float(swap), abs=1e-3)


def test_each_half_is_judged_by_its_own_person(work, monkeypatch):
    asked, trainer = [], fastcomposer.Trainer(work, name="judged")
    error = trainer.faces.error
    monkeypatch.setattr(trainer.faces, "error", lambda *given: asked.append(given) or error(*given))
    with torch.no_grad():
        loss, said = trainer.loss(16)
    ((clean, at, judged),) = asked
    assert clean.shape == (16, 4, 16, 16) and len(at) == 16 and 0 < judged.sum() < 16
    assert judged.view(-1, 2).all(1).tolist() == judged.view(-1, 2).any(1).tolist()
    z = trainer.z[at]
    swapped = z.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    own, other = ((clean - these).square()[judged].mean() for these in (z, swapped))
    assert own < 0.5 * other
    assert float(said["face_error"]) > 0 and 0.4 < float(said["elsewhere"]) < 0.6


def test_what_the_bench_draws(exported):
    """Two persons side by side, by the prompt alone and with pictures, which alone are told apart by `merge`."""
    case, reader, models = persons.cases(2), load_reader(), load.load_model("unet")
    found = [persons.drawn(reader, models, case, persons.by_words(models, merge, exported[1]), steps=2)
             for merge in (0.0, 1.0)]
    assert all(pictures.shape == (2, 3, 128, 256) for _, pictures in found)
    assert (found[0][1] - found[1][1]).abs().max() > 0.05
    assert found[0][0].keys() == persons.truth(reader, models[2], case).keys()


def test_two_persons_keep_what_is_theirs():
    """8 scenes of two unseen persons, one noise: a picture of each beside the words, from 30 % on."""
    reader, models, case = load_reader(), load.load_model("unet"), persons.cases(8)
    off, on = (persons.drawn(reader, models, case, steer, steps=10)[0]
               for steer in (None, persons.by_words(models, 0.3)))
    assert on["nearer"] >= 0.75 > off["nearer"] and on["identity"] > off["identity"] + 0.25
    assert on["taken"] > off["taken"] + 0.3 and on["mixed"] < off["mixed"]
    assert on["obeyed"] > off["obeyed"] - 0.1
