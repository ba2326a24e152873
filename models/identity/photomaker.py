"""PhotoMaker's files, version 1 and 2: an image encoder of its own, the fusing network and a LoRA for the UNet."""

import torch
from torch import nn

from .fuse import Fuse, Fuser, load, tower
from .projectors import Resampler, below

HEAD = 128  # channels of a head in version 2's perceiver
ENCODER, LORA = "id_encoder.", "lora_weights."


class FaceTokens(nn.Module):
    """Version 2: tokens of a face embedding [n, face] that ask the picture's hidden states [n, P, E]."""

    def __init__(self, shapes, ops):
        super().__init__()
        (inner, self.face), (out, _) = shapes["token_proj.0.weight"], shapes["token_proj.2.weight"]
        width = shapes["token_norm.weight"][0]
        self.tokens = out // width
        self.token_proj = nn.Sequential(ops.Linear(self.face, inner), nn.GELU(), ops.Linear(inner, out))
        self.token_norm = ops.LayerNorm(width)
        self.perceiver_resampler = Resampler(below(shapes, "perceiver_resampler."), ops, HEAD)

    def forward(self, face, x):
        tokens = self.token_norm(self.token_proj(face).unflatten(-1, (self.tokens, -1)))
        return tokens + self.perceiver_resampler(x, tokens)


class Network(nn.Module):
    """Version 1: e = [W_1 v; W_2 v], v the picture's pooled state. Version 2: e of `FaceTokens`."""

    def __init__(self, shapes, ops):
        super().__init__()
        self.vision_model, self.size = tower(below(shapes, "vision_model."), ops)
        for name in ("visual_projection", "visual_projection_2"):
            out, given = shapes[f"{name}.weight"]
            setattr(self, name, ops.Linear(given, out, bias=False))
        self.fuse_module = Fuse(below(shapes, "fuse_module."), ops)
        faces = below(shapes, "qformer_perceiver.")
        self.qformer_perceiver = FaceTokens(faces, ops) if faces else None

    def embed(self, pixels, face=None):
        states, _, pooled = self.vision_model(pixels)
        if self.qformer_perceiver is not None:
            return self.qformer_perceiver(face, states)
        return torch.cat((self.visual_projection(pooled), self.visual_projection_2(pooled)), -1)[:, None]

    def fuse(self, text, ids):
        return self.fuse_module(text, ids)


class PhotoMaker(Fuser):
    nodes = ("SteerPhotoMaker",)

    @property
    def kind(self):
        return f"PhotoMaker v{2 if self.face else 1}"

    def pixels(self, images):
        from comfy.clip_model import clip_preprocess

        return clip_preprocess(images, self.size)

    def __str__(self):
        """What it is and what it needs, for people."""
        takes = "pictures of a face, and its embedding in each" if self.face else "pictures of a face"
        return (
            f"{self.name}: {self.kind} for a model whose text has width {self.width}"
            f"{' (SDXL)' if self.width == 2048 else ''}. Words for each picture: {self.tokens}. "
            f"{self.megabytes:,.0f} MB.\nTakes {takes}; brings its image encoder"
            f"{' and a LoRA' if self.weights else ''}. For SteerPhotoMaker."
        )


def matches(shapes):
    return f"{ENCODER}fuse_module.layer_norm.weight" in shapes or "fuse_module.layer_norm.weight" in shapes


def from_state_dict(sd, name):
    """The `PhotoMaker` of a flat state dict."""
    from comfy.ops import manual_cast

    from ...patches.shared.conditioning import digest

    weights = below(sd, ENCODER) or dict(sd)
    weights.pop("vision_model.embeddings.position_ids", None)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    with torch.device("meta"):
        network = Network(shapes, manual_cast)
    faces = network.qformer_perceiver
    tokens, face = (1, 0) if faces is None else (faces.tokens, faces.face)
    told = digest([weights["fuse_module.mlp1.fc1.weight"][:1], weights["visual_projection.weight"][:1]])
    patcher = load(network, weights, name, "PhotoMaker")
    return PhotoMaker(
        name, tokens, network.fuse_module.width, network.size, face, told, patcher, below(sd, LORA)
    )
