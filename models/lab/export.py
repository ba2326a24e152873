"""Stage "export": checkpoints of the work folder -> fp16 safetensors beside this file."""

import json

import torch
from safetensors.torch import save_file

from . import common, latents
from .load import MODELS, TEXT
from .text import Vocabulary


def _half(weights):
    return {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in weights.items()}


def vae(work, out):
    save_file(_half(common.restore(work / "vae.ckpt")["average"]), out / "vae.safetensors")


def unet(work, out, which, checkpoint):
    average = common.restore(work / checkpoint)["average"]
    weights = {k.removeprefix("unet."): v for k, v in average.items() if k.startswith("unet.")}
    save_file(_half(weights), out / MODELS[which], metadata={"latents": json.dumps(latents.moments(work))})


def dit(work, out, which):
    weights = common.restore(work / f"{which}.ckpt")["average"]
    save_file(_half(weights), out / MODELS[which], metadata={"latents": json.dumps(latents.moments(work))})


def text(work, out, checkpoint):
    """Only the rows of the token table that captions use; the last row stands for every other token."""
    average = common.restore(work / checkpoint)["average"]
    weights = {"text_model" + k.removeprefix("text.host"): v for k, v in average.items() if k.startswith("text.host.")}
    weights["token_rows"] = weights.pop("text_model.embeddings.token_embedding.weight")
    weights["text_projection.weight"] = torch.eye(TEXT["hidden_size"])
    ids = torch.tensor(Vocabulary().ids, dtype=torch.int32)
    save_file(_half(weights) | {"token_ids": ids}, out / "text.safetensors")


def reader(work, out):
    save_file(_half(common.restore(work / "reader.ckpt")["model"]), out / "reader.safetensors")


def run(work, out, weak):
    """`weak` names the early checkpoint in `work` that becomes the weaker sibling."""
    out.mkdir(parents=True, exist_ok=True)
    vae(work, out)
    unet(work, out, "unet", "unet.ckpt")
    unet(work, out, "unet-weak", weak)
    dit(work, out, "dit")
    dit(work, out, "dit-weak")
    text(work, out, "unet.ckpt")
    reader(work, out)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors")) / 2**20
    print(f"{size:.1f} MB of weights in {out}")
