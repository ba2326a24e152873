"""The lab's PuLID for the Lab-DiT is trained as the node applies it, and is a file of the public layout."""

import comfy.sample
import pytest
import torch
from safetensors.torch import load_file
from steer.models.identity import adapter as files
from steer.models.identity.pulid import FLUX
from steer.models.lab import common, dit, evaluate, likeness, load, persons, pulid
from steer.models.lab.captions import phrases
from steer.models.lab.face import keypoints
from steer.models.lab.portrait import FACTORS, draw
from steer.models.lab.reader import load_reader
from steer.patches.identity import pulid as method
from steer.patches.shared.face import Face
from steer.patches.shared.schedule import Schedule

from nodes import CLIPTextEncode


@pytest.fixture(scope="module")
def exported(work):
    """A trainer with weights that are not zero, and in fp16 are what they are; its file."""
    made = pulid.Trainer(work, name="adapter_by_hand")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.model.parameters():
            p.copy_((p + 0.1 * torch.randn(p.shape, generator=generator)).half())
    made.average = common.Average(made.model)
    made.export(work)
    return made, work / "adapter_by_hand.safetensors"


@pytest.mark.parametrize("given", [True, False])
def test_is_trained_as_the_node_applies_it(exported, given):
    """One step of the host with the node and the file, for the positive or alone for the negative, and the DiT as the
    training asks it."""
    trainer, path = exported
    adapter = files.load(str(path))
    model, clip, pair = load.load_unet("dit"), load.load_clip("dit"), trainer.portraits[:2]
    parts = phrases(pair[0])
    prompt, nothing = (CLIPTextEncode().encode(clip, text)[0] for text in (", ".join(parts), ""))
    picture = torch.from_numpy(draw(pair[1]).copy())[None].float() / 255
    who = trainer.reader(picture.movedim(-1, 1))[2]
    face = Face(who, keypoints(pair[1])[None], picture)
    steered = method.apply(
        model, adapter, face, pulid.Eyes(), 1.0, "fidelity", -1, "one person", "as trained", Schedule()
    )
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    def host(model):
        conds = dict(positive=prompt, negative=nothing) if given else dict(positive=nothing, negative=prompt)
        options = dict(steps=1, cfg=1.0 if given else 0.0, sampler_name="euler", scheduler="simple", seed=0)
        return comfy.sample.sample(
            model, noise, latent_image=torch.zeros_like(noise), disable_pbar=True, **conds, **options
        )

    rows = torch.tensor([trainer.vocabulary.encode(parts)])
    with torch.no_grad(), dit.trainable():
        tokens = trainer.tokens(trainer.reference([pair[1]], torch.tensor([given])))
        options = trainer.add(tokens)
        v = trainer.dit(noise, torch.ones(1), *trainer.text(rows), transformer_options=options)
    sampling = trainer.base.model_sampling
    expected = trainer.base.latent_format.process_out(sampling.calculate_denoised(torch.ones(1), v, noise))
    assert (host(steered) - expected).abs().max() < 1e-2 * expected.std()
    assert (host(model) - expected).abs().max() > 0.1 * expected.std()


def test_each_of_a_batch_has_its_own_tokens_and_at_first_they_do_nothing(exported, work):
    trainer, begun = exported[0], pulid.Trainer(work, name="none")
    seen = trainer.reference(trainer.portraits[:3], torch.tensor([True, False, True]))
    assert not seen[0][1].any() and not seen[1][1].any() and seen[1].shape == (3, 5, 17, 192)
    with torch.no_grad():
        tokens = trainer.tokens(seen)
        alone = torch.cat([trainer.model.image_proj(*(x[n : n + 1] for x in seen)) for n in range(3)])
        begun.add(begun.tokens(seen))
        x = torch.randn(3, 64, 192)
        assert torch.equal(begun.follow((x, "text"), 0)[0], x)
    assert (tokens - alone).abs().max() < 1e-4 and (tokens[0] - tokens[2]).abs().max() > 1e-2


def test_its_keys_are_those_of_the_public_file(exported):
    path = exported[1]
    keys = {key.split(".", 1)[1] for key in load_file(path)}
    ca = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "to_q.weight", "to_kv.weight", "to_out.weight"}
    assert {key for key in load_file(path) if key.startswith("pulid_ca.")} == {
        f"pulid_ca.{n}.{key}" for n in range(4) for key in ca
    }
    assert {"latents", "proj_out", "id_embedding_mapping.6.bias", "mapping_4.3.weight", "layers.4.1.3.weight"} < keys
    adapter = files.load(str(path))
    assert (adapter.variant, adapter.nodes, adapter.hidden) == (FLUX, ("SteerPuLID",), (192,) * 4)
    assert (adapter.eva, adapter.image, adapter.tokens) == (128, 192, pulid.TOKENS)


def test_the_steps_of_its_training(work, monkeypatch, tmp_path, clock):
    """Every part is trained, and the training goes on where it stopped, and from the file."""
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    begun = {k: v.clone() for k, v in pulid.Trainer(work).model.state_dict().items()}
    pulid.train(work, 3, batch=4)
    first = torch.load(work / "adapter_pulid.ckpt", weights_only=True)
    assert first["step"] > 2
    assert [k for k, v in first["model"].items() if torch.equal(v, begun[k])] == []
    pulid.train(work, 5, batch=4)
    again = torch.load(work / "adapter_pulid.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 5
    weights = load_file(tmp_path / "adapter_pulid.safetensors")
    assert torch.equal(weights["pulid_ca.2.to_q.weight"], again["average"]["layers.2.to_q.weight"].half())
    (work / "adapter_pulid.ckpt").unlink()
    pulid.train(work, 0, shipped=True)
    assert set(weights) == set(anew := load_file(tmp_path / "adapter_pulid.safetensors"))
    assert [k for k, v in anew.items() if not torch.equal(v, weights[k])] == []


def test_what_the_bench_draws(exported):
    """One by one as without the node at strength 0, otherwise not."""
    case, options = likeness.faces(2, 70_000), {**evaluate.FLOW, "named": tuple(FACTORS), "steps": 2}
    reader, models = load_reader(), load.load_model("dit")
    off, on = (likeness.drawn_alone(reader, models, likeness.by_eyes(s, exported[1]), case, **options)
               for s in (0.0, 1.0))
    assert off == pytest.approx(likeness.drawn(reader, models, lambda model, _: model, case, **options), abs=0.02)
    assert abs(on["strangers"] - off["strangers"]) > 1e-3


def test_the_face_comes_over_and_the_prompt_tells_the_rest():
    """8 unseen faces, one noise, each shown by a picture that shares nothing else with what is asked for."""
    case, options = likeness.faces(8, 60_000), {**evaluate.FLOW, "named": tuple(FACTORS), "steps": 10}
    reader, models = load_reader(), load.load_model("dit")
    off, on = (likeness.drawn_alone(reader, models, likeness.by_eyes(s), case, **options) for s in (0.0, 1.0))
    assert on["identity"] > off["identity"] + 0.4 and on["identity"] > on["strangers"] + 0.4
    assert on["obeyed"] > 0.95


def test_two_persons_keep_their_faces():
    """6 scenes of two unseen persons: words and a face for each half."""
    found = persons.with_faces("dit", 6, steps=10, **evaluate.FLOW)
    assert found["and faces"]["nearer"] >= 0.75 > found["Regions"]["nearer"]
    assert found["and faces"]["identity"] > found["Regions"]["identity"] + 0.2
    assert abs(found["and faces"]["other's"]) < 0.2
