"""A CONDITIONING of a node's own as a branch of the run."""

import hashlib
from functools import partial

import torch

from .steering import Text


def text_of(name, conditioning):
    """A `Text` branch of a CONDITIONING."""
    return Text(name, digest(conditioning), partial(_converted, conditioning))


def _converted(conditioning, guider):
    from comfy.sampler_helpers import convert_cond

    return convert_cond(conditioning)


def digest(value):
    """Short hash of what a CONDITIONING holds; objects that are not data (a ControlNet) count as themselves."""
    sha = hashlib.sha256()

    def feed(v):
        if isinstance(v, torch.Tensor):
            sha.update(f"{v.dtype}{tuple(v.shape)}".encode())
            sha.update(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(v, dict):
            sha.update(b"{")
            for key in sorted(v, key=str):
                sha.update(str(key).encode())
                feed(v[key])
        elif isinstance(v, (list, tuple)):
            sha.update(f"[{len(v)}".encode())
            for each in v:
                feed(each)
        elif isinstance(v, (str, bytes, int, float, bool, type(None))):
            sha.update(repr(v).encode())
        else:
            sha.update(f"{type(v).__name__} {id(v)}".encode())

    feed(value)
    return sha.hexdigest()[:12]


def refuse_hooks(conditioning):
    """The host registers hooks of the sampler's own conditionings, before a run can name others."""
    from comfy.sampler_helpers import cond_has_hooks

    if cond_has_hooks(conditioning):
        raise ValueError(
            "its conditioning carries hooks (a LoRA or model patch for this prompt alone), which the host applies "
            "only to the conditionings of the sampler; take the hooks off it."
        )
