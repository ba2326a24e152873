"""Stage "pulid": an adapter of PuLID's layout for Flux (Guo et al. 2024, 2404.16022), for the exported Lab-DiT.

    adapter_pulid.safetensors   takes the reader's identity, and what the lab's image encoder sees in place of EVA-CLIP

The reference is another picture of the person, as for FaceID (adapters.py). Trained as the adapter of flow.py: PuLID's
alignment of what is drawn with and without it has no part here.
"""

from functools import partial

import numpy as np
import torch
from comfy.ops import disable_weight_init
from torch.nn.functional import normalize

from ...patches.identity.pulid import DOUBLE, SINGLE, shown
from ...patches.shared.face import Face
from ..identity.pulid import DEPTHS, FLUX, Network
from . import common, faceid, flow, load, vision
from .face import keypoints
from .portrait import draw
from .reader import load_reader

TOKENS, OWN, WIDTH, INNER, ASKED = 8, 5, 128, 64, 128  # ASKED: width of keys and queries, one head


def shapes():
    """(of the keys below pulid_encoder, of those of a layer)."""
    seen, who = load.VISION["hidden_size"], 512 + load.VISION["projection_dim"]
    w, text, hidden = WIDTH, load.TEXT["hidden_size"], load.DIT["hidden_size"]

    def mlp(name, given, inner, out):
        return {f"{name}.{n}.weight": size for n, size in ((0, (inner, given)), (3, (inner, inner)), (6, (out, inner)))}

    image = {"latents": (1, TOKENS, w), "proj_out": (w, text)} | mlp("id_embedding_mapping", who, 2 * INNER, OWN * w)
    for i in range(DEPTHS):
        image |= mlp(f"mapping_{i}", seen, INNER, w)
        image |= {f"layers.{i}.0.to_q.weight": (w, w), f"layers.{i}.1.1.weight": (w, w)}
    return image, {"to_q.weight": (ASKED, hidden), "norm1.weight": (text,)}


class Eyes:
    """The lab's image encoder in the place of an `EVAClip`."""

    def __init__(self):
        self.network = vision.exported()

    @torch.no_grad()
    def see(self, images):
        """(embedding [n, E], five states [n, 17, width]) of images [n, h, w, 3] in 0..1, on the CPU."""
        embedding, states = vision.states(self.network, images.float().to(common.device()))
        return embedding.cpu(), [x.cpu() for x in states]


class Trainer(flow.Trainer):
    choose = faceid.Face.choose
    parts = {"image_proj": "pulid_encoder", "layers": "pulid_ca"}

    def __init__(self, work, name="adapter_pulid", seed=0, lr=2e-3):
        super().__init__(work, name, seed, lr)
        self.reader, self.eyes = load_reader().to(common.device()), Eyes()
        blocks = [*self.dit.double_blocks[::DOUBLE], *self.dit.single_blocks[::SINGLE]]
        for n, block in enumerate(blocks):
            block.register_forward_hook(lambda module, args, out, n=n: self.follow(out, n))

    def adapter(self):
        image, layer = shapes()
        doubles, singles = load.DIT["depth"], load.DIT["depth_single_blocks"]
        count = len(range(0, doubles, DOUBLE)) + len(range(0, singles, SINGLE))
        made = Network(FLUX, image, [layer] * count, disable_weight_init)
        for name, p in made.named_parameters():
            if p.ndim < 2:
                torch.nn.init.constant_(p, float(name.endswith("weight")))  # of a norm
            elif name.endswith(("to_out.weight", ".1.3.weight")):
                torch.nn.init.zeros_(p)
            else:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        return made.requires_grad_(True)

    @torch.no_grad()
    def reference(self, portraits, given):
        """(who [B, 512 + E], states [B, 5, P, C]) of portraits, zero where there is none."""
        images = torch.from_numpy(np.stack([draw(p) for p in portraits])).float() / 255
        who = self.reader(images.movedim(-1, 1).to(given.device))[2]
        at = torch.stack([keypoints(p) for p in portraits])
        embedding, states = self.eyes.see(shown(Face(who, at, images)))
        who = torch.cat((who, normalize(embedding, dim=-1).to(who)), 1) * given[:, None]
        return who, torch.stack(states, 1).to(who) * given[:, None, None, None]

    def tokens(self, seen):
        each = torch.func.vmap(lambda who, states: self.model.image_proj(who[None], states[None])[0])
        return each(*seen)

    def add(self, tokens):
        self.pairs = [layer.keys_and_values(tokens) for layer in self.model.layers]
        return {}

    def follow(self, out, n):
        """What a block leaves, with the identity's answer to the image's tokens."""
        layer, (k, v) = self.model.layers[n], self.pairs[n]
        if isinstance(out, tuple):
            return out[0] + layer(out[0], k, v), out[1]
        text, image = out.split((load.TOKENS, out.shape[1] - load.TOKENS), 1)
        return torch.cat((text, image + layer(image, k, v)), 1)


train = partial(flow.train, which=Trainer)
