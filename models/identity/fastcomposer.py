"""FastComposer's file: a whole tuned Stable Diffusion 1.5, with an image encoder and the fusing network."""

import torch
from torch import nn

from .fuse import Fuse, Fuser, load, tower
from .projectors import below

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FUSE, ENCODER = "postfuse_module.", "image_encoder."
TUNED = ("unet.", "text_encoder.")


class Network(nn.Module):
    """e = W v, v the picture's pooled state."""

    def __init__(self, shapes, ops):
        super().__init__()
        self.image_encoder = nn.Module()
        self.image_encoder.vision_model, self.size = tower(below(shapes, f"{ENCODER}vision_model."), ops)
        out, given = shapes[f"{ENCODER}visual_projection.weight"]
        self.image_encoder.visual_projection = ops.Linear(given, out, bias=False)
        self.postfuse_module = Fuse(below(shapes, FUSE), ops)

    def embed(self, pixels):
        encoder = self.image_encoder
        return encoder.visual_projection(encoder.vision_model(pixels)[2])[:, None]

    def fuse(self, text, ids):
        return self.postfuse_module(text, ids)


class FastComposer(Fuser):
    nodes, kind = ("SteerFastComposer",), "FastComposer"

    def pixels(self, images):
        """The whole picture in a black square, as the encoder takes it: [n, 3, size, size]."""
        images = images[..., :3].movedim(-1, 1)
        h, w = images.shape[-2:]
        side = max(h, w)
        top, left = (side - h) // 2, (side - w) // 2
        square = nn.functional.pad(images, (left, side - w - left, top, side - h - top))
        small = nn.functional.interpolate(square, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(t).to(small)[:, None, None] for t in (MEAN, STD))
        return (small - mean) / std

    def __str__(self):
        """What it is and what it needs, for people."""
        parts = {"unet.": "the UNet", "text_encoder.": "the text encoder"}
        there = [what for prefix, what in parts.items() if any(key.startswith(prefix) for key in self.weights)]
        tuned = f"Brings weights of {' and '.join(there)} that were trained with it." if there else (
            "Its UNet and text encoder are not in the file; use the checkpoint it was trained with."
        )
        return (
            f"{self.name}: FastComposer for a model whose text has width {self.width}"
            f"{' (SD1.x)' if self.width == 768 else ''}. {self.megabytes:,.0f} MB.\nTakes one picture for each word; "
            f"brings its image encoder. {tuned} For SteerFastComposer."
        )


def matches(shapes):
    return f"{FUSE}layer_norm.weight" in shapes


def from_state_dict(sd, name):
    """The `FastComposer` of a flat state dict."""
    from comfy.ops import manual_cast

    from ...patches.shared.conditioning import digest

    drop = f"{ENCODER}vision_model.embeddings.position_ids"
    weights = {key: value for key, value in sd.items() if key.startswith((FUSE, ENCODER)) and key != drop}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    with torch.device("meta"):
        network = Network(shapes, manual_cast)
    told = digest([weights[f"{FUSE}mlp1.fc1.weight"][:1], weights[f"{ENCODER}visual_projection.weight"][:1]])
    patcher = load(network, weights, name, "FastComposer")
    tuned = {key: value for key, value in sd.items() if key.startswith(TUNED) and not key.endswith("position_ids")}
    return FastComposer(name, 1, network.postfuse_module.width, network.size, 0, told, patcher, tuned)
