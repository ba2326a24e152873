"""Adapter files as flat state dicts: safetensors, or pickles of tensors alone. Nothing in a file is run."""

import json
import os
import struct
import zipfile

HINTS = (  # part of a key -> what such a file is, and its folder
    ("model.diffusion_model.", "a whole checkpoint", "checkpoints"),
    ("controlnet_", "a ControlNet", "controlnet"),
    ("control_model.", "a ControlNet", "controlnet"),
    ("lora_down", "a LoRA", "loras"),
    ("lora_A", "a LoRA", "loras"),
    ("lora.down", "a LoRA", "loras"),
    ("vision_model.", "an image encoder", "clip_vision"),
    ("visual.transformer", "an image encoder", "clip_vision"),
    ("text_model.", "a text encoder", "text_encoders"),
    ("quant_conv", "a VAE", "vae"),
    ("encoder.down", "a VAE", "vae"),
    ("double_blocks.", "a diffusion model, or an adapter of one", "diffusion_models"),
    ("input_blocks.", "a diffusion model", "diffusion_models"),
)


def read(path):
    """{key: tensor} of a file, on the CPU, not copied where the file can be mapped. Dicts in it are joined with dots.

    ValueError, naming the file and what is wrong with it, where it cannot be read.
    """
    name = os.path.basename(path)
    if path.lower().endswith((".safetensors", ".sft")):
        _check_size(path, name)
    else:
        _check_archive(path, name)
    return flat(_load(path, name))


def flat(tree, prefix=""):
    """{"a.b": tensor} of {"a": {"b": tensor}}."""
    found = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def kind(keys):
    """What a file with these keys looks like, in words with the folder where it belongs; "" where nothing is known."""
    for part, what, folder in HINTS:
        if any(part in key for key in keys):
            return f"{what} (models/{folder})"
    return ""


def _load(path, name):
    import pickle

    from comfy.utils import load_torch_file

    try:
        found = load_torch_file(path, safe_load=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name} holds pickled code or objects beside tensors, which Steer does not load, since they could run "
            "anything; take the safetensors version of it."
        ) from error
    except (RuntimeError, EOFError, KeyError, AttributeError, OSError) as error:
        raise ValueError(f"{name} cannot be read as a file of tensors ({error}); download it again.") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name} holds no named tensors, but {type(found).__name__}; it is no adapter.")
    return found


def _check_size(path, name):
    """The header of a safetensors file says how long the file is."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        begin = file.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        text = file.read(length) if 0 < length <= size - 8 else b""
    try:
        header = json.loads(text)
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, AttributeError, TypeError, KeyError):
        what = "a web page" if begin.lstrip()[:1] == b"<" else "cut off, or something else under that name"
        raise ValueError(f"{name} is no safetensors file: it is {what}; download it again.") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise ValueError(f"{name} is cut off: it has {size:,} of {whole:,} bytes; download it again.")


def _check_archive(path, name):
    """What torch saves is a zip archive, whose end is lost first, or, before 2020, a pickle."""
    with open(path, "rb") as file:
        begin = file.read(16)
    if begin.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{name} is cut off: {os.path.getsize(path):,} bytes without an end; download it again.")
    if not begin.startswith((b"PK", b"\x80")):
        what = "a web page" if begin.lstrip()[:1] == b"<" else "something else under that name"
        raise ValueError(f"{name} is no file of torch: it is {what}; download it again.")
