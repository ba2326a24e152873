"""The lab's adapters are files of the public layout, and carry an unseen reference into the picture."""

import random

import torch
from safetensors.torch import load_file
from steer.models.identity import adapter as files
from steer.models.lab import adapters, common, data, faceid, likeness, load
from steer.models.lab.captions import parse
from steer.models.lab.portrait import FACTORS, Portrait
from steer.nodes.adapters import found, path_of
from steer.nodes.identity.ipadapter import LoadAdapter
from steer.patches.identity.faceid import lora_of

FILE = "adapter.safetensors"


def test_the_loader_offers_it_and_says_what_it_is(models):
    assert f"{FILE} [lab]" in found()
    adapter, said = LoadAdapter.execute(f"{FILE} [lab]", "auto").args
    assert adapter == files.load(str(path_of(f"{FILE} [lab]")))
    assert (adapter.variant, adapter.tokens, adapter.width, adapter.image) == ("plus", 16, 128, 192)
    assert "IP-Adapter plus" in said and "7 cross-attentions" in said
    adapter.check_encoder(load.load_vision().config)
    layers = [(a.to_k.out_features, a.to_k.in_features) for _, a in adapters.cross(models[0].model.diffusion_model)]
    assert layers == [(out, 128) for out in adapter.hidden]


def test_its_keys_are_those_of_the_public_plus_files():
    keys = set(load_file(load.WEIGHTS / FILE))
    layers = {f"image_proj.layers.{i}.{key}" for i in range(adapters.DEPTH) for key in (
        "0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias", "0.to_q.weight", "0.to_kv.weight",
        "0.to_out.weight", "1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight",
    )}
    ends = {f"image_proj.{name}.{kind}" for name in ("proj_in", "proj_out", "norm_out") for kind in ("weight", "bias")}
    pairs = {f"ip_adapter.{2 * n + 1}.to_{x}_ip.weight" for n in range(7) for x in "kv"}
    assert keys == {"image_proj.latents", *ends, *layers, *pairs}


def test_the_reference_comes_over_and_the_prompt_is_obeyed(models, reader):
    """8 unseen references, one noise: what the prompt leaves open is the reference's, a part of the face too."""
    case, options = likeness.cases(8, 60_000), dict(steps=10)
    off, on = (likeness.drawn(reader, models, likeness.by_picture(s), case, **options) for s in (0.0, 1.0))
    assert off["taken"] < 0.45 and on["taken"] > 0.8
    assert off["obeyed"] > 0.9 and on["obeyed"] > 0.9
    assert on["identity"] > max(off["identity"], on["strangers"]) + 0.3


def test_the_face_comes_over_and_the_prompt_tells_the_rest(models, reader):
    """16 unseen faces, one noise, one adapter told the identity of a picture that shares nothing else."""
    adapter = files.load(str(load.WEIGHTS / "adapter_faceid.safetensors"))
    assert (adapter.variant, adapter.tokens, adapter.face, len(adapter.lora)) == ("faceid", 4, 512, 14)
    case, options = likeness.faces(16, 60_000), dict(named=tuple(FACTORS), steps=10)
    off, on = (likeness.drawn(reader, models, likeness.by_face(s), case, **options) for s in (0.0, 1.0))
    assert on["identity"] > off["identity"] + 0.5 and on["identity"] > on["strangers"] + 0.5
    assert on["obeyed"] > 0.93


def test_the_steps_of_its_training(work, tmp_path, monkeypatch, clock):
    """Both kinds train every part, resume and export a file that the loader reads, and that they go on from."""
    monkeypatch.setattr(common, "WEIGHTS", tmp_path)
    monkeypatch.setattr(adapters, "CAPTIONS", 100)
    for which, name, variant in ((adapters.Plus, "adapter", "plus"), (faceid.Face, "adapter_faceid", "faceid")):
        begun = {k: v.clone() for k, v in which(work).model.state_dict().items()}
        adapters.train(work, 3, which, batch=4)
        first = torch.load(work / f"{name}.ckpt", weights_only=True)
        assert first["step"] > 3
        assert [k for k, v in first["model"].items() if torch.equal(v, begun[k])] == []
        adapters.train(work, 4, which, batch=4)
        again = torch.load(work / f"{name}.ckpt", weights_only=True)
        assert again["step"] > first["step"] and again["seconds"] >= 4
        adapter = files.load(str(tmp_path / f"{name}.safetensors"))
        assert adapter.variant == variant
        weights = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(weights["ip_adapter.1.to_k_ip.weight"], again["average"]["layers.0.to_k_ip.weight"].half())
        (work / f"{name}.ckpt").unlink()
        anew = which(work, lr=0.5)
        anew.load(tmp_path)
        assert anew.lr == 0.25
        shipped = {k: v.half() for k, v in again["average"].items()}
        assert [k for k, v in anew.model.state_dict().items() if not torch.equal(v.half(), shipped[k])] == []
        assert "face_error" in anew.loss(4)[1]  # what is shipped can say captions


def knowing(stage, seen):
    """eps of a network that knows every portrait; (latents with their noise, times, places) go to the list `seen`."""
    number = {id(p): n for n, p in enumerate(stage.portraits)}

    def eps(x, t, rows, tokens, portraits):
        sigma, at = stage.base.model_sampling.sigmas[t].view(-1, 1, 1, 1), [number[id(p)] for p in portraits]
        seen.append((x * (sigma**2 + 1).sqrt(), t.tolist(), at))
        return (seen[-1][0] - stage.z[at]) / sigma + 0 * tokens.sum()

    return eps


def test_half_of_a_batch_is_drawn_by_the_network_itself(work, monkeypatch):
    """The drawings are shown as they are, each for its own text and reference; all that is not the portrait in them is
    noise, so one that knows every portrait makes no error on the drawings of one that knows none."""
    stage, size, seen, asked = adapters.Plus(work), 8, [], []
    stage.until, reference = 0.0, stage.reference
    before = [one._replace(latent=5 * torch.randn_like(one.latent)) for one in stage.drawings.under_way]
    stage.drawings.under_way = list(before)

    def examples(stage, size, usual=adapters.examples):
        return *usual(stage, size)[:-1], torch.zeros(size, dtype=torch.bool)

    def asks(portraits, given):
        asked.append((portraits, given))
        return reference(portraits, given)

    monkeypatch.setattr(stage, "eps", knowing(stage, seen))
    monkeypatch.setattr(stage, "reference", asks)
    monkeypatch.setattr(adapters, "examples", examples)
    _, said = stage.loss(size)
    assert said["eps_error"] < 1e-6
    gone_on = [one for one, now in zip(before, stage.drawings.under_way, strict=True) if one is not now]
    assert len(gone_on) == size // 2
    (shown, t, at), (looked, given) = seen[0], asked[0]
    assert given.sum() == size // 2
    for one in gone_on:
        n = next(n for n in range(size) if torch.allclose(shown[n], one.latent, atol=1e-4))
        assert (t[n], at[n], looked[n]) == (one.t, one.at, one.looked) and given[n]


def test_it_draws_under_guidance(work, monkeypatch):
    """A step goes along 1 + r (CFG - 1) times the noise that a network sees only where it is told something."""
    stage, calls, steps = faceid.Face(work), [], []

    def eps(x, t, rows, tokens, portraits):
        calls.append(rows)
        return torch.full_like(x, float(len(calls) == 1)) + 0 * tokens.sum()

    monkeypatch.setattr(stage, "eps", eps)
    monkeypatch.setattr(stage.drawings, "go_on", lambda number, step: steps.append(step))
    stage.loss(16)
    assert len(calls) == 2 and len(steps) == 8
    cfg = torch.stack([step.mean() for step in steps])
    assert all(step.max() - step.min() < 1e-5 for step in steps) and 1 <= cfg.min() and 2 < cfg.max() <= adapters.CFG


def test_what_is_drawn_is_told_by_text_and_reference_together(work, monkeypatch):
    stage, chosen = faceid.Face(work), []
    choose = stage.choose
    monkeypatch.setattr(stage, "choose", lambda portrait: chosen.append(choose(portrait)) or chosen[-1])
    for _ in range(30):
        at, z, row, looked = stage.example()
        parts, reference = chosen[-1]
        assert looked is reference and torch.equal(z, stage.z[at])
        told = parse(", ".join(parts))
        assert all(told.get(n, getattr(looked, n)) == getattr(stage.portraits[at], n) for n in FACTORS)
        assert row.tolist() == stage.vocabulary.encode(parts)
        assert looked.geometry == stage.portraits[at].geometry
    assert len(chosen) > 35


def test_every_attention_has_the_files_lora_as_it_was_trained(work, tmp_path, models):
    stage = faceid.Face(work)
    with torch.no_grad():
        for p in stage.model.lora.parameters():
            p.normal_(std=0.05)
    stage.average = common.Average(stage.model)
    stage.export(tmp_path)
    given, at = lora_of(models[0], files.load(str(tmp_path / "adapter_faceid.safetensors")))
    assert len(at) == 4 * 2 * 7
    for name in at:
        linear = stage.base.diffusion_model.get_submodule(name)
        change = given[f"{name}.lora_up.weight"].float() @ given[f"{name}.lora_down.weight"].float()
        assert change.abs().max() > 0.01
        torch.testing.assert_close(linear.weight - linear.parametrizations.weight.original, change, rtol=0, atol=1e-4)


def test_the_judge_looks_at_guided_estimates(work, monkeypatch):
    """Under 1 + r (CFG - 1), r the same: from 1 to 5 twice as far as to 3, and nowhere without a condition."""
    stage = faceid.Face(work)
    judge, looked = stage.faces.error, []
    monkeypatch.setattr(adapters, "DRAWN", 0.0)

    def error(clean, *rest):
        looked.append(clean.detach())
        return judge(clean, *rest)

    def clean(cfg):
        monkeypatch.setattr(adapters, "CFG", cfg)
        stage.rng.seed(0)
        torch.manual_seed(0)
        stage.loss(8)
        return looked.pop()

    monkeypatch.setattr(stage.faces, "error", error)
    one, three, five = (clean(cfg) for cfg in (1.0, 3.0, 5.0))
    assert (three - one).std() > 0.1 * one.std()
    torch.testing.assert_close(five - one, 2 * (three - one), rtol=1e-3, atol=1e-3 * float(one.std()))
    monkeypatch.setattr(stage, "choose", lambda portrait: ([], None))
    torch.testing.assert_close(clean(5.0), clean(1.0), rtol=1e-3, atol=1e-3 * float(one.std()))


def test_the_words_it_learns_to_say():
    """At each place stands the last token of the factor's value, then twice the end."""
    trainer = adapters.Plus.__new__(adapters.Plus)
    trainer.vocabulary = adapters.Vocabulary()
    words = {row: token for token, row in trainer.vocabulary.rows.items()}
    spell = trainer.vocabulary.tokenizer.tokenizer
    for seed in range(40):
        portrait = Portrait.from_seed(seed)
        row = trainer.vocabulary.encode(adapters.phrases(portrait))
        *places, end, after = trainer.places(portrait)
        for name, at in zip(FACTORS, places, strict=True):
            value = getattr(portrait, name)
            assert words[row[at]] == spell(value)["input_ids"][-2], (name, value)
        assert row[end] == row[after] == trainer.vocabulary.rows[trainer.vocabulary.end] and row[end - 1] != row[end]


def test_what_a_text_names_it_names_rightly_and_the_reference_keeps_the_face():
    trainer = adapters.Plus.__new__(adapters.Plus)
    trainer.rng = random.Random(0)
    kinds = {"neither": 0, "picture": 0, "text": 0, "both": 0}
    for seed in range(300):
        portrait = Portrait.from_seed(data.HELD_OUT + seed)
        parts, seen = trainer.choose(portrait)
        kinds[("neither", "text", "picture", "both")[bool(parts) + 2 * (seen is not None)]] += 1
        said = parse(", ".join(parts)) if parts else {}
        assert all(getattr(portrait, name) == value for name, value in said.items())
        if seen is not None:
            assert seen.geometry == portrait.geometry
            assert {n for n in FACTORS if getattr(seen, n) != getattr(portrait, n)} <= set(said)
    assert all(kinds.values()) and kinds["picture"] > 40 and kinds["both"] > 160
