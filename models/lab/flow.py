"""Stage "adapter-dit": an IP-Adapter of InstantX' layout for the exported Lab-DiT, which is frozen.

    adapter_dit.safetensors   tokens of the picture as a whole, keys and values of all blocks; models/identity/joint.py

What text and reference say in training, and who judges faces, is as for the plus adapter (adapters.py), but that the
judge counts once and sees no guidance, and that it draws nothing itself.
"""

import numpy as np
import torch
from comfy.ops import disable_weight_init
from safetensors.torch import load_file

from ...patches.shared.jointreference import rms
from ..identity.joint import INSTANTX, Network
from . import adapters, common, data, edit, geometry, load, vision
from .dit import network, plain_attention, times, trainable
from .portrait import draw
from .stage import Stage
from .text import Vocabulary

TOKENS, INNER = 16, 256
LATEST = 0.85  # time after which the clean estimate shows no face to judge


class Trainer(Stage):
    parts = {"image_proj": "image_proj", "layers": "ip_adapter"}  # of the model, and their names in the file

    def __init__(self, work, name="adapter_dit", seed=0, lr=2e-3):
        torch.manual_seed(seed)
        device = common.device()
        self.base = network(load.latent_stats("dit"))
        self.dit = self.base.diffusion_model.requires_grad_(False)
        self.dit.load_state_dict({k: v.float() for k, v in load_file(load.WEIGHTS / load.MODELS["dit"]).items()})
        self.vocabulary, self.encoder = Vocabulary(), edit.text_encoder()
        self.vision = vision.exported()
        super().__init__(work, name, self.adapter().to(device), seed=seed, lr=lr)
        latents = torch.from_numpy(np.load(work / "edits.npy")).float().to(device)
        self.z = self.base.latent_format.process_in(latents.flatten(0, 1))
        self.portraits = [p for n in range(len(latents)) for p in data.edit(n)[:2]]
        self.faces = geometry.Faces(work, self.portraits, self.base.latent_format)

    choose = adapters.Plus.choose

    def adapter(self):
        """The network of the file, initialised."""
        width, hidden = load.TEXT["hidden_size"], load.DIT["hidden_size"]
        image = {"proj.0.weight": (INNER, load.VISION["projection_dim"]), "proj.2.weight": (TOKENS * width, INNER),
                 "norm.weight": (width,)}
        layers = [{f"to_{x}_ip.weight": (hidden, width) for x in "kv"}] * (
            load.DIT["depth"] + load.DIT["depth_single_blocks"]
        )
        made = Network(INSTANTX, image, layers, disable_weight_init)
        adapters.initialise(made.image_proj)
        for p in made.layers.parameters():
            torch.nn.init.normal_(p, std=width**-0.5)
        return made.requires_grad_(True)

    @torch.no_grad()
    def reference(self, portraits, given):
        """The encoder's embedding of portraits [B, E], zero where there is none."""
        images = torch.from_numpy(np.stack([draw(p) for p in portraits])).to(given.device).float() / 255
        return vision.look(self.vision, images)[1].float() * given[:, None]

    def tokens(self, seen):
        """[B, T, D] of what `reference` gives."""
        return self.model.image_proj(seen)

    def text(self, rows):
        """[B, 77] rows -> context and pooled vector, as the host gives them."""
        x = self.encoder(rows)
        end = (rows == self.vocabulary.rows[self.vocabulary.end]).int().argmax(1)
        return x[:, : load.TOKENS], x[torch.arange(len(rows), device=rows.device), end]

    def add(self, tokens):
        """transformer_options that add attention to `tokens` [B, T, D] in every block, as `JointReference` does."""
        heads = load.DIT["num_heads"]
        pairs = [[rms(layer[f"to_{x}_ip"](tokens), heads).unflatten(2, (heads, -1)).transpose(1, 2) for x in "kv"]
                 for layer in self.model.layers]
        asked = {}

        def ask(q, k, v, extra_options, **rest):
            asked["q"] = q
            return {}

        def answer(out, options):
            single = options["block_type"] == "single"
            first = 0 if single else options["img_slice"][0]
            k, v = pairs[options["block_index"] + load.DIT["depth"] * single]
            seen = plain_attention(asked["q"][:, :, first:], k.to(out), v.to(out), heads)
            return torch.cat((out[:, :first], out[:, first:] + seen), 1)

        return {"patches": {"attn1_patch": [ask], "attn1_output_patch": [answer]}}

    def loss(self, size):
        at, z, rows, looked, given = adapters.examples(self, size)
        t, noise = times(size, z.device), torch.randn_like(z)
        x = self.base.model_sampling.noise_scaling(t.view(-1, 1, 1, 1), noise, z)
        with common.autocast():
            tokens = self.tokens(self.reference(looked, given))
            v = self.dit(x, t, *self.text(rows), transformer_options=self.add(tokens)).float()
        error = (v - (noise - z)).square().mean()
        face = self.faces.error(x - t.view(-1, 1, 1, 1) * v, at, given & (t < LATEST))
        return error + face, {"velocity_error": error.detach(), "face_error": face.detach()}

    def files(self):
        keys = {f"{self.parts[part]}.{rest}": f"{part}.{rest}"
                for part, rest in (name.split(".", 1) for name in self.model.state_dict())}
        return {f"{self.path.stem}.safetensors": keys}


def train(work, budget, batch=32, lr=2e-3, seed=0, shipped=False, which=Trainer):
    with trainable():
        stage = which(work, seed=seed, lr=lr)
        if shipped:
            stage.load(common.WEIGHTS)
        stage.run(budget, batch)
        stage.export(common.WEIGHTS)
