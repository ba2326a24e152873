"""Stage "vision": the lab's image encoder, a small vision transformer of the host's CLIP kind.

It learns to tell all factors and the face geometry of a portrait from its embedding; the heads that tell them are
dropped afterwards. Portraits are sharp or degraded; some are drawn anew for every step. Where it goes on from what was
shipped, the face counts for more, and its states are held near the shipped ones, which others have learned to read.
"""

from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPVisionModelProjection, clip_preprocess
from comfy.ops import disable_weight_init
from safetensors.torch import load_file

from . import common, load
from .data import HELD_OUT
from .portrait import GEOMETRY, SIZE, Portrait, draw
from .reader import SIZES
from .reading import degrade
from .stage import Stage
from .unet import plain_attention


def network():
    """The host's encoder, initialised: residual branches start at zero."""
    model = CLIPVisionModelProjection(load.VISION, torch.float32, "cpu", disable_weight_init)
    for name, p in model.named_parameters():
        if p.ndim < 2 and "class" not in name:
            torch.nn.init.constant_(p, float("norm" in name and name.endswith("weight")))
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            torch.nn.init.zeros_(p)
        else:
            torch.nn.init.normal_(p, std=0.3 if "embedding" in name else p[0].numel() ** -0.5)
    return model


@torch.no_grad()
def principal(model, images):
    """Lets the patch embedding begin as principal components of patches, which spares it a long search.

    images [B, H, W, 3] in [0, 1].  Square roots of their spreads are left, so that the small ones are heard too.
    """
    embeddings, n = model.vision_model.embeddings, load.VISION["patch_size"]
    x = clip_preprocess(images, size=SIZE).unfold(2, n, n).unfold(3, n, n).permute(0, 2, 3, 1, 4, 5).flatten(3)
    x = x.flatten(1, 2)
    mean = x.mean(0)  # of each place
    _, spread, basis = torch.svd_lowrank((x - mean).flatten(0, 1), q=load.VISION["hidden_size"], niter=2)
    weight = (basis * (spread / len(images) ** 0.5).rsqrt()).T
    embeddings.patch_embedding.weight.copy_(weight.view_as(embeddings.patch_embedding.weight))
    embeddings.position_embedding.weight[1:] -= mean @ weight.T


def exported(out=load.WEIGHTS):
    """The trained encoder in the folder `out`, frozen, on the device."""
    model = network().to(common.device()).requires_grad_(False)
    model.load_state_dict({k: v.float() for k, v in load_file(out / "vision.safetensors").items()})
    return model


def look(model, images):
    """images [B, H, W, 3] in [0, 1] -> (hidden states before the last layer [B, 17, D], embedding [B, E]).

    The host's numbers, but differentiable: its layers add in place, which autograd refuses.
    """
    embedding, hidden = states(model, images)
    return hidden[-2], embedding


def states(model, images):
    """The same -> (embedding [B, E], hidden states before each layer and after the last)."""
    tower = model.vision_model
    found = [tower.pre_layrnorm(tower.embeddings(clip_preprocess(images, size=SIZE)))]
    for layer in tower.encoder.layers:
        x = found[-1] + layer.self_attn(layer.layer_norm1(found[-1]), None, plain_attention)
        found.append(x + layer.mlp(layer.layer_norm2(x)))
    return model.visual_projection(tower.post_layernorm(found[-1][:, 0])), found


POOL, FRESH = 4096, 16  # portraits to choose from, and how many of them are new in each step
NEAR = 0.3  # weight of the distance to the shipped states, in their variance


class Vision(Stage):
    sharp, face = 0.5, 2.0  # share of pictures that are not degraded, weight of the geometry's error
    shipped = None  # the encoder to stay near to

    def __init__(self, work, name="vision", seed=0, lr=2e-3):
        torch.manual_seed(seed)
        head = torch.nn.Linear(load.VISION["projection_dim"], sum(SIZES) + len(GEOMETRY))
        model = torch.nn.ModuleDict({"vision": network(), "head": head})
        sample = np.stack([draw(Portrait.from_seed(n)) for n in range(512)])
        principal(model["vision"], torch.from_numpy(sample).float() / 255)
        super().__init__(work, name, model, ("patch_embedding", "position", "head"), seed, lr, decay=0.99)
        self.pool = deque(maxlen=POOL)

    def load(self, out):
        super().load(out)
        self.shipped, self.sharp, self.face = exported(out), 0.75, 8.0

    def batch(self, size):
        """-> images [B, 128, 128, 3], indices of the factors [B, 11], geometry [B, 6]."""
        for _ in range(size if not self.pool else FRESH):
            portrait = Portrait.from_seed(self.rng.randrange(HELD_OUT))
            self.pool.append((draw(portrait), portrait))
        chosen = self.rng.sample(self.pool, size)
        images = torch.from_numpy(np.stack([x for x, _ in chosen])).to(common.device()).movedim(-1, 1) / 255
        sharp = round(self.sharp * size)
        images = torch.cat([images[:sharp], degrade(images[sharp:])]).movedim(1, -1)
        factors = torch.tensor([p.indices for _, p in chosen], device=images.device)
        return images, factors, torch.tensor([p.geometry for _, p in chosen], device=images.device)

    def loss(self, size):
        images, factors, geometry = self.batch(size)
        with common.autocast():
            found = states(self.model["vision"], images)
            told = self.model["head"](found[0]).float()
        *logits, measured = told.split([*SIZES, len(GEOMETRY)], 1)
        words = sum(F.cross_entropy(v, factors[:, i]) for i, v in enumerate(logits)) / len(logits)
        error = (measured - geometry).square().mean()
        right = torch.stack([v.argmax(1) == factors[:, i] for i, v in enumerate(logits)]).float().mean()
        said = {"accuracy": right, "geometry_error": error.detach()}
        loss = words + self.face * error
        if self.shipped is not None:
            far = self.distance(found, images)
            loss, said = loss + NEAR * far, said | {"distance": far.detach()}
        return loss, said

    def distance(self, found, images):
        """Mean squared distance of embedding and hidden states to the shipped encoder's, each in its variance."""
        with torch.no_grad():
            embedding, hidden = states(self.shipped, images)
        pairs = zip((found[0], *found[1]), (embedding, *hidden), strict=True)
        return torch.stack([(a - b).square().mean() / b.var(0).mean() for a, b in pairs]).mean()

    def files(self):
        own = (key for key in self.model.state_dict() if key.startswith("vision."))
        return {"vision.safetensors": {key.removeprefix("vision."): key for key in own}}  # without the heads


def train(work, budget, batch=64, lr=2e-3, seed=0, shipped=False):
    stage = Vision(work, seed=seed, lr=lr)
    if shipped:
        stage.load(common.WEIGHTS)
    stage.run(budget, batch)
    stage.export(common.WEIGHTS)
