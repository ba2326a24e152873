"""A CLIP_VISION of the host as `Features`, differentiable in the picture."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .gradient import differentiable

KEYS = ("k_proj", "key")  # names of what makes the keys in the host's vision transformers


@dataclass(frozen=True)
class Vision:
    """`Features` of a CLIP_VISION of the host: the keys of its last layer, [CLS] among them, and its embedding."""

    vision: Any = field(repr=False)
    patchers: tuple = field(repr=False)

    def features(self, pictures):
        (patcher,), eye, kept = self.patchers, self.vision, []
        network, size = patcher.model, (eye.image_size, eye.image_size)
        mean, std = (torch.tensor(v).view(3, 1, 1).to(pictures) for v in (eye.image_mean, eye.image_std))
        pictures = (F.interpolate(pictures, size, mode="bicubic", antialias=True) - mean) / std
        last = [module for name, module in network.named_modules() if name.split(".")[-1] in KEYS][-1]
        handle = last.register_forward_hook(lambda module, args, keys: kept.append(keys))
        try:
            embedding = network(pixel_values=pictures.to(patcher.load_device), intermediate_output=-2)[2]
        finally:
            handle.remove()
        return kept[0].float(), embedding.flatten(1).float()


def vision(model):
    """`Vision` of a CLIP_VISION; ValueError where it has no keys to look at."""
    if not any(name.split(".")[-1] in KEYS for name, _ in model.model.named_modules()):
        raise ValueError(f"finds no keys in this vision model ({type(model.model).__name__}); use a CLIP or DINOv2.")
    return Vision(model, (differentiable(model.patcher),))
