"""EVA-CLIP's image encoder: the published arithmetic, the files that hold it, and those that do not."""

import pickle

import comfy.model_management as mm
import pytest
import torch
from attention.by_hand import near
from identity import oracle_eva
from identity.oracle_fuse import MEAN, STD
from safetensors.torch import save_file
from steer.models.identity import evaclip
from steer.nodes import adapters
from steer.nodes.identity.pulid import LoadEVACLIP
from torch.nn.functional import interpolate

SIZE = oracle_eva.SIDE * oracle_eva.PATCH


def pictures(n=2, h=SIZE, w=SIZE, seed=0):
    return torch.rand(n, h, w, 3, generator=torch.Generator().manual_seed(seed))


def same(found, expected, within=1e-4):
    return all(near(a, b, within) for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True))


def test_it_sees_as_published():
    sd = oracle_eva.file()
    made, expected = evaclip.from_state_dict(dict(sd), "eva.pt"), oracle_eva.seen(sd, pictures())
    found = made.see(pictures())
    assert made.size == SIZE and same(found, expected)
    assert [tuple(x.shape) for x in found[1]] == 5 * [(2, 1 + oracle_eva.PATCHES, oracle_eva.STATES)]
    assert all(not near(a, b, 1e-2) for a, b in zip(found[1], found[1][1:], strict=False))
    one = made.see(pictures()[1:])
    assert near(one[0], found[0][1:]) and near(one[1][4], found[1][4][1:])


def test_both_layouts_and_the_vision_part_alone():
    sd = oracle_eva.file()
    expected = evaclip.from_state_dict(dict(sd), "eva.pt").see(pictures())
    alone = {key.removeprefix("visual."): value for key, value in sd.items() if key.startswith("visual.")}
    for other in (oracle_eva.as_timm(sd), alone):
        found = evaclip.from_state_dict(other, "other.safetensors").see(pictures())
        assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


def test_pictures_of_any_size():
    made = evaclip.from_state_dict(oracle_eva.file(), "eva.pt")
    large = pictures(1, 50, 40)
    small = interpolate(large.movedim(-1, 1), (SIZE, SIZE), mode="bicubic", antialias=True).movedim(1, -1)
    with torch.no_grad():
        expected = made.patcher.model(((small - MEAN) / STD).movedim(-1, 1))
    assert same(made.see(large), expected)


def test_the_public_encoder_at_its_size():
    """Sizes of EVA02_CLIP_L_336_psz14_s6B, without memory for them."""
    wide, inner = 1024, 2730
    shapes = {
        "cls_token": (1, 1, wide), "pos_embed": (1, 577, wide), "patch_embed.proj.weight": (wide, 3, 14, 14),
        "head.weight": (768, wide), "blocks.0.mlp.w1.weight": (inner, wide), "blocks.23.norm1.weight": (wide,),
    }
    with torch.device("meta"):
        network = evaclip.Network(shapes, torch.nn)
        assert (network.size, network.side, len(network.blocks)) == (336, 24, 24)
        assert network.blocks[0].attn.heads == 16 and evaclip.angles(24).shape == (577, 1, 32)
    count = sum(p.numel() for p in network.parameters())
    assert 304.0e6 < count < 304.5e6  # 304.3 M, as timm counts its twin


def test_half_precision_and_the_hosts_memory():
    sd = oracle_eva.file()
    expected = evaclip.from_state_dict(dict(sd), "eva.pt").see(pictures())
    mm.unload_all_models()
    made = evaclip.from_state_dict({key: value.half() for key, value in sd.items()}, "half.pt")
    assert {p.dtype for p in made.patcher.model.parameters()} == {torch.float16}
    assert same(made.see(pictures()), expected, 1e-2)
    assert made.patcher.model in [each.model.model for each in mm.current_loaded_models if each.model is not None]


class Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_other_files_are_named(tmp_path, capsys):
    good = oracle_eva.file()
    cut = {key: value for key, value in good.items() if key != "visual.blocks.3.norm2.weight"}
    headless = {key: value for key, value in good.items() if ".head." not in key}
    with torch.device("meta"):
        smaller = good | {"visual.cls_token": torch.empty(1, 1, 1024), "visual.pos_embed": torch.empty(1, 257, 1024)}
    for sd, words in (
        ({"vision_model.embeddings.class_embedding": torch.ones(2)}, r"is no EVA02-CLIP: it is an image encoder"),
        ({"a.lora_down.weight": torch.ones(2)}, "is no EVA02-CLIP: it is a LoRA"),
        ({"weird": torch.ones(2)}, "is no EVA02-CLIP: it is unknown, with keys such as weird"),
        (cut, "looks like EVA02-CLIP, but its keys do not fit: .*norm2"),
        (headless, "looks like EVA02-CLIP, but has no 'head.weight'"),
        (oracle_eva.file(12), "is an EVA02-CLIP of 12 blocks. PuLID needs EVA02-CLIP-L-14-336"),
        (smaller, "is EVA02-CLIP-L-14, which sees pictures of 96 pixels. PuLID needs EVA02-CLIP-L-14-336"),
    ):
        with pytest.raises(ValueError, match=f"(?s)^x.pt {words}"):
            evaclip.from_state_dict(sd, "x.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"visual": Code()}))
    with pytest.raises(ValueError, match="^code.pt holds pickled code"):
        evaclip.load(str(tmp_path / "code.pt"))
    assert "never" not in capsys.readouterr().out


def test_the_node_lists_folders_and_reads_files(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for name in ("clip_vision", "text_encoders"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], set()))
    for name in ("clip_vision/a.safetensors", "text_encoders/t5.safetensors", "text_encoders/EVA02.safetensors",
                 "eva_clip/b.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(oracle_eva.file(), tmp_path / name)
    *files, lab = adapters.eva_clips()
    assert files == ["a.safetensors", "EVA02.safetensors [text_encoders]", "b.safetensors [eva_clip]"]
    assert LoadEVACLIP.validate_inputs(lab) is True
    embedding, states = LoadEVACLIP.execute(lab).args[0].see(pictures()[:1])
    assert embedding.shape == (1, 128) and [x.shape for x in states] == 5 * [(1, 17, 192)]
    for file in files:
        assert LoadEVACLIP.validate_inputs(file) is True
        (made,) = LoadEVACLIP.execute(file).args
        assert made.size == SIZE and made.name == file.split(" [")[0]
    for file in ("../eva_clip/b.safetensors", "none.pt"):
        assert LoadEVACLIP.validate_inputs(file) is not True
    save_file({"weird": torch.ones(2)}, tmp_path / "clip_vision/a.safetensors")
    with pytest.raises(ValueError, match="^SteerLoadEVACLIP: a.safetensors is no EVA02-CLIP"):
        LoadEVACLIP.execute("a.safetensors")
