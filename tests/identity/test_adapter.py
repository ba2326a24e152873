"""Adapter files: each variant is known by its keys, its projector is the paper's, and bad files say what they are."""

import pickle

import comfy.ops
import pytest
import torch
import toy
from identity import oracle
from safetensors.torch import save_file
from steer.models.identity import adapter, files
from steer.nodes import adapters
from steer.nodes.identity.ipadapter import LoadAdapter
from steer.patches.shared.reference import in_file_order

ENCODERS = {"ViT-H": (1280, 1024), "bigG": (1664, 1280), "ViT-L": (1024, 768)}
SDXL = dict(
    toy.SD15, channel_mult=[1, 2, 4], num_res_blocks=[2, 2, 2], transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10, context_dim=2048,
    use_linear_in_transformer=True,
)
SD1 = (320,) * 2 + (640,) * 2 + (1280,) * 2 + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,)
XL = (640,) * 4 + (1280,) * 20 + (1280,) * 30 + (640,) * 6 + (1280,) * 10


def given(variant, n=2):
    """What the projector of a variant takes of n pictures, (x, face)."""
    x = oracle.rand(n, oracle.EMBEDDING, seed=1) if variant == "base" else oracle.rand(n, 5, oracle.STATES, seed=1)
    face = torch.nn.functional.normalize(oracle.rand(n, 512, seed=2), dim=-1)
    faces = "face" in variant and variant != "full-face" or variant == "portrait"
    return (None if faces and "plus" not in variant else x), (face if faces else None)


def close(a, b):
    return a.shape == b.shape and float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


def empty(**shapes):
    """Tensors of any size that take no memory."""
    return {key.replace("__", "."): torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def public(hidden, text, **projector):
    """A file with true shapes."""
    layers = {f"{2 * n + 1}.to_{k}_ip.weight": (w, text) for n, w in enumerate(hidden) for k in "kv"}
    image = {f"image_proj.{key}": value for key, value in empty(**projector).items()}
    return image | {f"ip_adapter.{key}": torch.zeros(1).expand(shape) for key, shape in layers.items()}


@pytest.mark.parametrize("form", ["bin", "safetensors", "adapter_modules"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_a_file_is_known_and_projects_as_published(tmp_path, variant, form):
    tree, name = oracle.file(variant), "ip-adapter-" + variant.replace(" ", "").replace("v1", "")
    path = tmp_path / f"{name}.{'bin' if form == 'bin' else 'safetensors'}"
    if form == "bin":
        torch.save(tree, path)
    else:
        sd = oracle.flat(tree)
        rename = "adapter_modules." if form == "adapter_modules" else "ip_adapter."
        save_file({key.replace("ip_adapter.", rename): value for key, value in sd.items()}, path)
    made = adapter.load(str(path))
    assert (made.variant, made.width, made.hidden, made.name) == (variant, oracle.TEXT, oracle.HIDDEN, path.name)
    x, face = given(variant)
    tokens = oracle.tokens(variant, tree["image_proj"], x, face)
    assert made.tokens == (0 if variant == "full-face" else tokens.shape[1])
    assert (made.image, made.face) == (0 if x is None else x.shape[-1], 0 if face is None else 512)
    options = {"structure": 1.0} if variant.endswith("v2") else {}
    assert close(made.project(*(t for t in (face, x) if t is not None), **options), tokens)
    assert len(made.lora) == (2 * len(oracle.HIDDEN) if "faceid" in variant else 0)
    e = oracle.rand(1, 3, oracle.TEXT, seed=9)
    for n, ((k, v),) in made.keys_and_values([e], range(len(oracle.HIDDEN))).items():
        layer = tree["ip_adapter"]
        assert close(k, e @ layer[f"{2 * n + 1}.to_k_ip.weight"].T)
        assert close(v, e @ layer[f"{2 * n + 1}.to_v_ip.weight"].T)


def test_structure_of_version_2():
    tree = oracle.file("faceid-plus v2")
    made = adapter.from_state_dict(oracle.flat(tree), "ip-adapter-faceid-plusv2_sd15.bin")
    x, face = given("faceid-plus v2")
    tokens = oracle.tokens("faceid-plus v2", tree["image_proj"], x, face, 0.3)
    assert close(made.project(face, x, structure=0.3), tokens)


@pytest.mark.parametrize("name, variant, expected", [
    ("ip-adapter-faceid-plus_sd15.bin", "auto", "faceid-plus v1"),
    ("ip-adapter-faceid-plusv2_sd15.bin", "auto", "faceid-plus v2"),
    ("renamed.bin", "faceid-plus v2", "faceid-plus v2"),
    ("ip-adapter-plus_sd15.bin", "auto", "plus"),
    ("ip-adapter-plus-face_sdxl_vit-h.safetensors", "auto", "plus-face"),
    ("ip_plus_composition_sd15.safetensors", "auto", "composition"),
    ("renamed.bin", "plus-face", "plus-face"),
])
def test_what_keys_cannot_tell_comes_from_the_name_or_the_user(name, variant, expected):
    kind = "faceid-plus v1" if "faceid" in expected else "plus"
    assert adapter.from_state_dict(oracle.flat(oracle.file(kind)), name, variant).variant == expected


@pytest.mark.parametrize("config, hidden", [(toy.SD15, SD1), (SDXL, XL)], ids=["SD1.5", "SDXL"])
def test_layers_of_files_are_those_of_the_true_networks(config, hidden):
    """The encoder's, the decoder's, then the middle's: 16 and 70."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        network = UNetModel(**config, num_heads=-1, num_head_channels=64, operations=comfy.ops.disable_weight_init)
    found = in_file_order(network)
    assert tuple(attention.to_q.out_features for *_, attention in found) == hidden
    assert [layer.group for layer, *_ in found] == sorted((layer.group for layer, *_ in found), key=("input", "output",
                                                                                                  "middle").index)


@pytest.mark.parametrize("hidden, text, projector, model, needs", [
    (SD1, 768, dict(proj__weight=(3072, 1024), proj__bias=(3072,), norm__weight=(768,), norm__bias=(768,)), "SD1.x",
     "CLIP ViT-H/14"),
    (XL, 2048, dict(proj__weight=(8192, 1280), proj__bias=(8192,), norm__weight=(2048,), norm__bias=(2048,)), "SDXL",
     "CLIP ViT-bigG/14"),
    (SD1, 768, dict(proj__0__weight=(1280, 1280), proj__0__bias=(1280,), proj__2__weight=(768, 1280),
                    proj__2__bias=(768,), proj__3__weight=(768,), proj__3__bias=(768,)), "SD1.x", "CLIP ViT-H/14"),
], ids=["base SD1.5", "base SDXL", "full-face SD1.5"])
def test_true_shapes_name_model_and_encoder(hidden, text, projector, model, needs):
    made = adapter.from_state_dict(public(hidden, text, **projector), "file.safetensors")
    assert f"({model})" in str(made) and needs in str(made)
    for name, (states, embedding) in ENCODERS.items():
        config = {"hidden_size": states, "projection_dim": embedding}
        if name in needs:
            made.check_encoder(config)
        else:
            with pytest.raises(ValueError, match=rf"^file.safetensors needs {needs}.*; wired is CLIP [^,]*{name}"):
                made.check_encoder(config)


def test_a_file_is_mapped_and_not_copied(tmp_path):
    """fp16 stays fp16, and tensors are the file's pages, not memory of their own."""
    path = tmp_path / "a.safetensors"
    save_file({key: value.half() for key, value in oracle.flat(oracle.file("plus")).items()}, path)
    made = adapter.load(str(path))
    parameters = list(made.patcher.model.parameters())
    assert {p.dtype for p in parameters} == {torch.float16} and not any(p.requires_grad for p in parameters)
    mapped = [line.split()[0] for line in open("/proc/self/maps") if str(path) in line]
    spans = [tuple(int(end, 16) for end in span.split("-")) for span in mapped]
    assert spans and all(any(a <= p.data_ptr() < b for a, b in spans) for p in parameters)


class Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def bad_files(folder):
    """(path, what is said of it)."""
    good = oracle.flat(oracle.file("plus"))
    for name, sd, words in (
        ("lora.safetensors", {"lora_unet_a.lora_down.weight": torch.ones(2, 2)}, r"is no IP-Adapter: it is a LoRA"),
        ("whole.safetensors", {"model.diffusion_model.out.0.weight": torch.ones(2)}, "it is a whole checkpoint"),
        ("clip.safetensors", {"vision_model.a.weight": torch.ones(2)}, r"an image encoder \(models/clip_vision\)"),
        ("other.safetensors", {"weird": torch.ones(2)}, "unknown, with keys such as weird"),
        ("half.safetensors", {k: v for k, v in good.items() if "norm_out" not in k}, "has no 'norm_out|do not fit"),
        ("more.safetensors", good | {"image_proj.extra": torch.ones(2)}, "keys do not fit: .*extra"),
        ("one.safetensors", {k: v for k, v in good.items() if "3.to_v_ip" not in k}, "has no '3.to_v_ip.weight'"),
        ("proj.safetensors", {k: v for k, v in good.items() if "latents" not in k}, "projector that is not known"),
    ):
        save_file(sd, folder / name)
        yield folder / name, words
    save_file(good, folder / "cut.safetensors")
    whole = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    yield folder / "cut.safetensors", r"is cut off: it has [\d,]+ of [\d,]+ bytes"
    torch.save(oracle.file("plus"), folder / "cut.bin")
    whole = (folder / "cut.bin").read_bytes()
    (folder / "cut.bin").write_bytes(whole[: len(whole) // 2])
    yield folder / "cut.bin", "is cut off"
    for name, content, words in (
        ("empty.safetensors", b"", "is no safetensors file"),
        ("page.safetensors", b"<!DOCTYPE html><html>not found</html>", "it is a web page"),
        ("page.bin", b"<html>not found</html>", "it is a web page"),
        ("renamed.safetensors", whole, "is no safetensors file"),
        ("old.bin", pickle.dumps({"image_proj": Code()}), "holds pickled code"),
    ):
        (folder / name).write_bytes(content)
        yield folder / name, words
    torch.save({"image_proj": Code(), "ip_adapter": {}}, folder / "code.bin")
    yield folder / "code.bin", "holds pickled code"


def test_bad_files_are_named(tmp_path, capsys):
    for path, words in bad_files(tmp_path):
        with pytest.raises(ValueError, match=rf"(?s)^{path.name} .*({words})"):
            adapter.load(str(path))
    assert "never" not in capsys.readouterr().out
    with pytest.raises(ValueError, match='is IP-Adapter base, which cannot be "plus-face"; set variant to "auto"'):
        adapter.from_state_dict(oracle.flat(oracle.file("base")), "b.bin", "plus-face")


def test_nested_dicts_are_flat():
    assert files.flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_the_node_lists_folders_and_finds_files(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", ([str(tmp_path / "elsewhere")], set()))
    for name in ("elsewhere/sub/a.safetensors", "ipadapter/b.bin", "pulid/c.safetensors", "ipadapter/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(oracle.flat(oracle.file("base")), tmp_path / name)
    assert [name for name in adapters.found() if not name.endswith("[lab]")] == [
        "b.bin", "sub/a.safetensors", "c.safetensors [pulid]"
    ]
    assert adapters.path_of("c.safetensors [pulid]") == tmp_path / "pulid" / "c.safetensors"
    for outside in ("../pulid/c.safetensors", "readme.txt", "none.bin", "c.safetensors"):
        assert adapters.path_of(outside) is None and LoadAdapter.validate_inputs(outside) is not True
    made, words = LoadAdapter.execute("sub/a.safetensors", "auto").args
    assert made.variant == "base" and words.startswith("a.safetensors: IP-Adapter base")
    with pytest.raises(ValueError, match="SteerLoadAdapter: b.bin"):
        LoadAdapter.execute("b.bin", "auto")
    before = LoadAdapter.fingerprint_inputs("sub/a.safetensors")
    save_file(oracle.flat(oracle.file("plus")), tmp_path / "elsewhere/sub/a.safetensors")
    assert LoadAdapter.fingerprint_inputs("sub/a.safetensors") != before
