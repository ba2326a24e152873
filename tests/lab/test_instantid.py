"""The lab's InstantID is trained as the node applies it, and comes in files of the public layout."""

import comfy.controlnet
import comfy.sample
import pytest
import torch
from safetensors.torch import load_file
from steer.models.identity import adapter as files
from steer.models.lab import common, data, evaluate, instantid, likeness, load, persons
from steer.models.lab.captions import phrases
from steer.models.lab.face import LabRecogniser, keypoints
from steer.models.lab.portrait import FACTORS, Portrait, draw
from steer.models.lab.reader import load_reader
from steer.patches.identity import face
from steer.patches.identity import instantid as method
from steer.patches.shared.schedule import Schedule

from nodes import CLIPTextEncode


@pytest.fixture(scope="module")
def trainer(work):
    """With weights that are not zero, and in fp16 are what they are."""
    made = instantid.InstantID(work, name="adapter_by_hand")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.model.parameters():
            if not p.any():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
            p.copy_(p.half())
    made.average = common.Average(made.model)
    return made


def test_keypoints_are_where_the_renderer_draws():
    p = Portrait(glasses="no glasses", expression="angry", mouth_width=0.5, eye_spacing=-0.5, nose_length=0.7)
    points = keypoints(p)
    dark = torch.from_numpy(draw(p).astype("float32")).mean(-1) < 60
    rows, columns = torch.meshgrid(*(torch.arange(128.0),) * 2, indexing="ij")
    for x, y in points[:2].tolist():  # pupils
        near = dark & ((rows - y - 2).abs() < 5) & ((columns - x).abs() < 6)
        assert abs(columns[near].mean() + 0.5 - x) < 1
    assert points[3, 0] < points[0, 0] < points[2, 0] < points[1, 0] < points[4, 0]
    found = LabRecogniser().find(torch.from_numpy(draw(p).copy()).float() / 255)[1][0]
    assert (found - points).abs().max() < 2


def test_is_trained_as_the_node_applies_it(work, trainer, tmp_path):
    """One step of the host with the node and the exported files, and the UNet as the training asks it."""
    trainer.export(tmp_path)
    made = files.load(str(tmp_path / "adapter_by_hand.safetensors"))
    net = load.load_control(tmp_path / "controlnet.safetensors")
    assert (made.variant, made.tokens, made.face, made.width) == ("face-resampler", instantid.TOKENS, 512, 128)
    p, model = trainer.portraits[0], load.load_unet()
    clip = load.load_clip()
    parts = phrases(p)
    positive, negative = (CLIPTextEncode().encode(clip, text)[0] for text in (", ".join(parts), ""))
    who = trainer.reference([p], torch.tensor([True]))
    hint = face.draw(keypoints(p)[None], (128, 128))
    always = Schedule()
    steered, positive, negative = method.apply(
        model, positive, negative, made, net, who, hint, 1.0, 1.0, "linear", "auto", always
    )
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    def host(model, positive):
        options = dict(steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", seed=0, disable_pbar=True)
        return comfy.sample.sample(
            model, noise, positive=positive, negative=negative, latent_image=torch.zeros_like(noise), **options
        )

    sampling = trainer.base.model_sampling
    sigma, t = sampling.sigma_max.view(1, 1, 1, 1), torch.tensor([999])
    x = sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)
    xc = sampling.calculate_input(sigma, x)
    rows = torch.tensor([trainer.vocabulary.encode(parts)])
    with torch.no_grad(), instantid.added():
        tokens = trainer.model.image_proj(who)
        control = trainer.control(xc, t, tokens, [p])
        eps = trainer.unet(xc, t.float(), trainer.encoder(rows), control=control,
                           transformer_options=trainer.add(tokens))
    expected = trainer.base.latent_format.process_out(sampling.calculate_denoised(sigma, eps, x))
    out = host(steered, positive)
    assert (out - expected).abs().max() < 1e-2 * expected.std()
    plain = [[c, {k: v for k, v in o.items() if k not in ("control", "model_conds")}] for c, o in positive]
    assert (host(model, plain) - expected).abs().max() > 0.2 * expected.std()
    assert (host(steered, plain) - expected).abs().max() > 0.1 * expected.std()


def test_the_controlnet_adds_nothing_at_first(work):
    begun = instantid.InstantID(work, name="none")
    x, tokens = torch.randn(2, 4, 16, 16), torch.randn(2, instantid.TOKENS, 128)
    with torch.no_grad():
        said = begun.control(x, torch.tensor([10, 500]), tokens, begun.portraits[:2])
    assert not any(h.any() for hs in said.values() for h in hs)
    unet = begun.base.diffusion_model.state_dict()
    own = begun.model.control.state_dict()
    shared = [k for k in own if k in unet]
    assert len(shared) > 100 and all(torch.equal(own[k], unet[k]) for k in shared)


def test_its_keys_are_those_of_the_public_file(trainer, tmp_path):
    trainer.export(tmp_path)
    keys = set(load_file(tmp_path / "adapter_by_hand.safetensors"))
    layers = {f"image_proj.layers.{i}.{key}" for i in range(instantid.DEPTH) for key in (
        "0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias", "0.to_q.weight", "0.to_kv.weight",
        "0.to_out.weight", "1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight",
    )}
    ends = {f"image_proj.{name}.{kind}" for name in ("proj_in", "proj_out", "norm_out") for kind in ("weight", "bias")}
    assert keys == {"image_proj.latents", *ends, *layers} | {
        f"ip_adapter.{2 * n + 1}.to_{x}_ip.weight" for n in range(7) for x in "kv"
    }
    net = set(load_file(tmp_path / "controlnet.safetensors"))
    assert {"zero_convs.0.0.weight", "middle_block_out.0.weight", "input_hint_block.14.weight"} < net
    assert not any(key.startswith("output_blocks") for key in net)


def test_the_steps_of_its_training(work, monkeypatch, tmp_path, clock):
    """Every part is trained, the training goes on where it stopped, and exports both files, to go on from."""
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    begun = {k: v.clone() for k, v in instantid.InstantID(work).model.state_dict().items()}
    instantid.train(work, 3, batch=4)
    first = torch.load(work / "adapter_instantid.ckpt", weights_only=True)
    assert first["step"] > 3
    assert [k for k, v in first["model"].items() if torch.equal(v, begun[k])] == []
    instantid.train(work, 4, batch=4)
    again = torch.load(work / "adapter_instantid.ckpt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] >= 4
    weights = load_file(tmp_path / "controlnet.safetensors")
    assert torch.equal(weights["zero_convs.3.0.weight"], again["average"]["control.zero_convs.3.0.weight"].half())
    assert isinstance(load.load_control(tmp_path / "controlnet.safetensors"), comfy.controlnet.ControlNet)
    (work / "adapter_instantid.ckpt").unlink()
    anew = instantid.InstantID(work)
    anew.load(tmp_path)
    shipped = {k: v.half() for k, v in again["average"].items()}
    assert [k for k, v in anew.model.state_dict().items() if not torch.equal(v.half(), shipped[k])] == []


def test_what_the_bench_draws(trainer, tmp_path):
    """One by one as without the node at strength 0, in the poses of the references; otherwise not."""
    trainer.export(tmp_path)
    paths = dict(file=tmp_path / "adapter_by_hand.safetensors", net=tmp_path / "controlnet.safetensors")
    case, options = likeness.faces(2, 70_000, likeness.POSED), dict(named=tuple(FACTORS), steps=2)
    assert all(getattr(a, n) == getattr(b, n) for a, b in zip(*case[:2], strict=True) for n in likeness.POSED)
    reader, models = load_reader(), load.load_model("unet")
    off, on, words = (likeness.drawn_alone(reader, models, likeness.by_keypoints(*s, **paths), case, **options)
                      for s in ((0.0,), (1.0,), (1.0, 0.0)))
    assert off == pytest.approx(likeness.drawn(reader, models, lambda model, _: model, case, **options), abs=0.02)
    assert off.keys() == {"obeyed", "identity", "strangers"}
    assert len({round(row["strangers"], 3) for row in (off, on, words)}) == 3


def test_the_face_comes_over(models, reader):
    """8 unseen faces in poses of their own, one noise; the prompt tells all but the face."""
    case, options = likeness.faces(8, 60_000, likeness.POSED), dict(named=tuple(FACTORS), steps=10)
    off, on = (likeness.drawn_alone(reader, models, likeness.by_keypoints(s), case, **options) for s in (0.0, 1.0))
    assert on["identity"] > off["identity"] + 0.5 and on["identity"] > on["strangers"] + 0.5
    assert on["obeyed"] > 0.9


def test_the_keypoints_say_where(models, reader):
    """A prompt that says nothing of the place: with the ControlNet the face is where its keypoints are."""
    people = [Portrait.from_seed(data.HELD_OUT + 61_000 + n, position=("left", "right")[n % 2]) for n in range(8)]
    text = [", ".join(phrases(p, {"style", "hat", "background"})) for p in people]

    def placed(control):
        images = (torch.from_numpy(draw(p)[None].copy()).float() / 255 for p in people)
        steers = (likeness.by_keypoints(0.0, control)(image) for image in images)
        noise = evaluate.noise_of(8, 1).split(1)
        made = [evaluate.sample_noise(models, [said], part, steps=8, steer=by)
                for said, part, by in zip(text, noise, steers, strict=True)]
        read = reader.read(torch.cat(made).clamp(0, 1))
        return sum(r["position"][0] == p.position for r, p in zip(read, people, strict=True)) / 8

    assert placed(1.0) >= 0.9 and placed(0.0) <= 0.7


def test_two_persons_keep_their_faces_and_their_words():
    """6 scenes of two unseen persons: words, keypoints and a face for each half."""
    found = persons.with_faces("unet", 6, steps=10)
    assert found["and faces"]["nearer"] >= 0.75 > found["Regions"]["nearer"]
    assert found["and faces"]["identity"] > found["Regions"]["identity"] + 0.25
    assert abs(found["and faces"]["other's"]) < 0.2
    assert found["and faces"]["obeyed"] >= 0.85
