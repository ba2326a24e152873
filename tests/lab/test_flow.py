"""The lab's IP-Adapter for the Lab-DiT is trained as the node applies it, and is a file of InstantX' layout."""

import comfy.sample
import pytest
import torch
from safetensors.torch import load_file
from steer.models.identity import adapter as files
from steer.models.identity.joint import INSTANTX
from steer.models.lab import common, dit, evaluate, flow, likeness, load
from steer.models.lab.captions import phrases
from steer.models.lab.portrait import draw
from steer.models.lab.reader import load_reader
from steer.patches.identity import ipadapter
from steer.patches.shared.schedule import Schedule

from nodes import CLIPTextEncode


@pytest.fixture(scope="module")
def exported(work):
    """A trainer, and its file; in fp16 its weights are what they are."""
    made = flow.Trainer(work, name="adapter_by_hand")
    with torch.no_grad():
        for p in made.model.parameters():
            p.copy_(p.half())
    made.average = common.Average(made.model)
    made.export(work)
    return made, work / "adapter_by_hand.safetensors"


@pytest.mark.parametrize("said", [True, False])
def test_is_trained_as_the_node_applies_it(exported, said):
    """One step of the host with the node and the file, and the DiT as the training asks it."""
    trainer, path = exported
    adapter, vision = files.load(str(path)), load.load_vision()
    model, clip = load.load_unet("dit"), load.load_clip("dit")
    p = trainer.portraits[0]
    parts = phrases(p) if said else []
    positive = CLIPTextEncode().encode(clip, ", ".join(parts))[0]
    picture = torch.from_numpy(draw(p).copy())[None].float() / 255
    steered = ipadapter.apply(
        model, adapter, 1.0, "linear", "auto", "concat", "as trained", Schedule(), image=picture, clip_vision=vision
    )
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    def host(model):
        options = dict(steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", seed=0, disable_pbar=True)
        return comfy.sample.sample(
            model, noise, positive=positive, negative=positive, latent_image=torch.zeros_like(noise), **options
        )

    rows = torch.tensor([trainer.vocabulary.encode(parts)])
    with torch.no_grad(), dit.trainable():
        seen = flow.vision.look(trainer.vision, picture)[1]
        options = trainer.add(trainer.model.image_proj(seen))
        v = trainer.dit(noise, torch.ones(1), *trainer.text(rows), transformer_options=options)
    sampling = trainer.base.model_sampling
    expected = trainer.base.latent_format.process_out(sampling.calculate_denoised(torch.ones(1), v, noise))
    assert (host(steered) - expected).abs().max() < 1e-2 * expected.std()
    assert (host(model) - expected).abs().max() > 0.2 * expected.std()


def test_its_keys_are_those_of_the_public_file(exported):
    _, path = exported
    assert set(load_file(path)) == {
        f"image_proj.{name}.{kind}" for name in ("proj.0", "proj.2", "norm") for kind in ("weight", "bias")
    } | {f"ip_adapter.{n}.to_{x}_ip.weight" for n in range(8) for x in "kv"}
    adapter = files.load(str(path))
    assert (adapter.variant, adapter.tokens, adapter.hidden) == (INSTANTX, flow.TOKENS, (192,) * 8)
    adapter.check_encoder(load.load_vision().config)


def test_an_encoder_that_does_not_pool_is_refused(exported):
    """SigLIP's, without the head; the lab's pools by itself."""
    adapter, model = files.load(str(exported[1])), load.load_unet("dit")
    siglip = {**load.VISION, "model_type": "siglip_vision_model", "hidden_size": 128, "num_attention_heads": 2}
    del siglip["projection_dim"]
    picture = torch.rand(1, 128, 128, 3)
    with pytest.raises(ValueError, match="pooling head"):
        ipadapter.apply(model, adapter, 1.0, "linear", "auto", "concat", "as trained", Schedule(), image=picture,
                        clip_vision=load.vision_model(siglip))


def test_the_steps_of_its_training(work, monkeypatch, tmp_path, clock):
    """Every part is trained, and the training goes on where it stopped, and from the file."""
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    begun = {k: v.clone() for k, v in flow.Trainer(work).model.state_dict().items()}
    flow.train(work, 3, batch=4)
    first = torch.load(work / "adapter_dit.ckpt", weights_only=True)
    assert first["step"] > 3
    assert [k for k, v in first["model"].items() if torch.equal(v, begun[k])] == []
    flow.train(work, 4, batch=4)
    again = torch.load(work / "adapter_dit.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 4
    weights = load_file(tmp_path / "adapter_dit.safetensors")
    assert torch.equal(weights["ip_adapter.2.to_v_ip.weight"], again["average"]["layers.2.to_v_ip.weight"].half())
    (work / "adapter_dit.ckpt").unlink()
    flow.train(work, 0, shipped=True)
    assert set(weights) == set(anew := load_file(tmp_path / "adapter_dit.safetensors"))
    assert [k for k, v in anew.items() if not torch.equal(v, weights[k])] == []


def test_what_the_bench_draws(exported):
    """As without the node at strength 0, otherwise not; each of a batch by its own reference."""
    case, options = likeness.cases(2, 70_000), {**evaluate.FLOW, "steps": 2}
    reader, models = load_reader(), load.load_model("dit")
    off, on = (likeness.drawn(reader, models, likeness.by_picture(s, exported[1]), case, **options) for s in (0.0, 1.0))
    assert off == likeness.drawn(reader, models, lambda model, _: model, case, **options)
    assert abs(on["strangers"] - off["strangers"]) > 1e-3


def test_the_reference_comes_over_and_the_prompt_is_obeyed():
    """8 unseen references, one noise: what the prompt leaves open is the reference's, the face too."""
    case, options = likeness.cases(8, 60_000), {**evaluate.FLOW, "steps": 10}
    reader, models = load_reader(), load.load_model("dit")
    by = (likeness.by_picture(strength, "adapter_dit.safetensors") for strength in (0.0, 0.75))
    off, on = (likeness.drawn(reader, models, steer, case, **options) for steer in by)
    assert off["taken"] < 0.4 and on["taken"] > off["taken"] + 0.35
    assert off["obeyed"] > 0.9 and on["obeyed"] > 0.9
    assert off["identity"] < 0.25 and on["identity"] > on["strangers"] + 0.4
