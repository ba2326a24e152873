"""Stage "fastcomposer": FastComposer (Xiao et al. 2023, 2305.10431) on scenes of two persons.

    adapter_fastcomposer.safetensors   layout of the public file: image encoder, fusing network, and of the UNet what is
                                       tuned: its transformers

A scene is two portraits side by side, 256 x 128, which Lab-UNet never saw. The prompt says a few factors of each; the
word "person" of each is fused with a picture of that person, who looks otherwise in what the prompt says. It learns
from the eps error, from what a judge of faces says of each half (geometry.py), and as in the paper (section 4.2) from
where the network looks at each of the words: it should do so in that person's half.
"""

from dataclasses import replace

import numpy as np
import torch
from comfy.ops import disable_weight_init
from comfy.utils import unet_to_diffusers
from safetensors.torch import load_file, save_file

from ..identity.fastcomposer import ENCODER, FUSE, Network
from . import common, data, edit, geometry, load
from .adapters import LATEST, cross
from .captions import phrases
from .portrait import FACTORS, draw
from .stage import Stage
from .text import Vocabulary
from .unet import Balance, plain_attention, swapped

INNER = 256  # of the fusing network
WORD, MOST = "person", 3  # what is fused; factors that are said of a person at most, so that two fit into a prompt
NO_TEXT, NO_IMAGE = 0.1, 0.1
PLACES = 0.2  # weight of what is looked at from the other person's half


def fusing_shapes():
    w = load.TEXT["hidden_size"]
    return {"mlp1.fc1.weight": (INNER, 2 * w), "mlp1.fc2.weight": (w, INNER), "mlp2.fc1.weight": (INNER, w),
            "mlp2.fc2.weight": (w, INNER), "layer_norm.weight": (w,)}


def network(encoder):
    """The file's network: the lab's image encoder, and a fusing network that at first leaves the word as it is, as far
    as `encoder`, of the text, has normalised it."""
    vision = load_file(load.WEIGHTS / "vision.safetensors")
    vision = {f"{ENCODER}{key}": value for key, value in vision.items()}
    shapes = {key: tuple(value.shape) for key, value in vision.items()}
    made = Network(shapes | {f"{FUSE}{k}": v for k, v in fusing_shapes().items()}, disable_weight_init)
    made.load_state_dict({k: v.float() for k, v in vision.items()}, strict=False)
    with torch.no_grad():
        for name, p in made.postfuse_module.named_parameters():
            if p.ndim == 2 and "fc1" in name:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
        last = encoder.host.final_layer_norm
        made.postfuse_module.layer_norm.load_state_dict(last.state_dict())
    return made.to(common.device()).requires_grad_(False)


def told(portrait, rng):
    """(phrases that say a few factors of a portrait, the portrait as a reference, where they are others)."""
    said = rng.sample(list(FACTORS), rng.randrange(MOST + 1))
    return phrases(portrait, said), replace(portrait, **{name: rng.choice(FACTORS[name]) for name in said})


class Trainer(Stage):
    def __init__(self, work, name="adapter_fastcomposer", seed=0, lr=1e-3):
        torch.manual_seed(seed)
        device = common.device()
        self.base = load.unet_model(load.latent_stats("unet")).to(device)
        unet = self.base.diffusion_model
        unet.load_state_dict({k: v.float() for k, v in load_file(load.WEIGHTS / load.MODELS["unet"]).items()})
        unet.requires_grad_(False)
        tuned = {name.replace(".", "/"): module for name, module in unet.named_modules()
                 if type(module).__name__ == "SpatialTransformer"}
        self.blocks = [block for block, _ in cross(unet)]
        self.unet, self.vocabulary, self.encoder = unet._forward, Vocabulary(), edit.text_encoder()
        self.row = self.vocabulary.rows[self.vocabulary.tokenizer.tokenizer(WORD)["input_ids"][1]]
        self.network = network(self.encoder)
        fuse = self.network.postfuse_module
        model = torch.nn.ModuleDict({"fuse": fuse, "unet": torch.nn.ModuleDict(tuned)}).requires_grad_(True)
        self.balance = Balance()
        self.balance.mean.fill_(0.03)
        super().__init__(work, name, model, seed=seed, lr=lr, kept={"balance": self.balance.mean})
        latents = torch.from_numpy(np.load(work / "edits.npy")).float().to(device)
        self.z = self.base.latent_format.process_in(latents.flatten(0, 1))
        self.portraits = [p for n in range(len(latents)) for p in data.edit(n)[:2]]
        self.faces = geometry.Faces(work, self.portraits, self.base.latent_format)

    @torch.no_grad()
    def seen(self, portraits):
        """The file's embeddings of portraits, [B, E]."""
        from ..identity.fastcomposer import FastComposer

        images = torch.from_numpy(np.stack([draw(p) for p in portraits])).to(common.device()).float() / 255
        pixels = FastComposer("", 1, 0, self.network.size).pixels(images)
        return self.network.embed(pixels)[:, 0]

    def text(self, pairs):
        """(context of prompts about two portraits each, rows and columns of the words that hold pictures [2 G])."""
        said, looked, given = [], [], []
        for pair in pairs:
            two = [told(p, self.rng) for p in pair]
            empty = self.rng.random() < NO_TEXT
            said.append([] if empty else [part for parts, _ in two for part in parts])
            looked += [p for _, p in two]
            given.append(not empty and self.rng.random() >= NO_IMAGE)
        rows = torch.tensor([self.vocabulary.encode(parts) for parts in said], device=self.z.device)
        context, given = self.encoder(rows), torch.tensor(given, device=rows.device)
        at = ((rows == self.row) & given[:, None]).nonzero(as_tuple=True)
        ids = self.seen(looked).unflatten(0, (-1, 2))[given].flatten(0, 1)
        context = context.clone()
        context[at] = self.network.fuse(context[at], ids).to(context.dtype)
        return context, at

    def watched(self, at, shares):
        """transformer_options under which every cross-attention adds to `shares`: how much of what looks at a word of
        `at` lies in the other person's half."""
        rows, columns = at

        def attend(q, k, v, extra):
            heads = extra["n_heads"]
            asking, asked = (t[rows].unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))
            seen = (asking @ asked.mT * asking.shape[-1] ** -0.5).softmax(-1).mean(1)
            seen = seen[torch.arange(len(rows)), :, columns]
            high = round((seen.shape[1] / 2) ** 0.5)
            left, right = seen.unflatten(1, (high, 2, high)).sum((1, 3)).view(-1, 2, 2).unbind(2)
            own, other = left[:, 0] + right[:, 1], left[:, 1] + right[:, 0]
            shares.append((other / (own + other)).float())
            return plain_attention(q, k, v, heads)

        return {"patches_replace": {"attn2": dict.fromkeys(self.blocks, attend)}}

    def loss(self, size):
        size = size // 2
        at = [self.rng.choices(range(len(self.z)), k=2) for _ in range(size)]
        z = torch.stack([torch.cat(list(self.z[pair]), -1) for pair in at])
        sampling = self.base.model_sampling
        t = ((torch.randperm(size) + torch.rand(size)) * (1000 / size)).long().clamp(max=999).to(z.device)
        sigma, noise = sampling.sigmas[t].view(-1, 1, 1, 1), torch.randn_like(z)
        x = sampling.calculate_input(sigma, z + sigma * noise)
        with common.autocast():
            context, words = self.text([[self.portraits[i] for i in pair] for pair in at])
            shares = []
            eps = self.unet(x, t.float(), context, transformer_options=self.watched(words, shares)).float()
        error = (eps - noise).square().mean((1, 2, 3))
        elsewhere = torch.cat(shares).mean() if len(words[0]) else error.new_zeros(())
        given = torch.zeros_like(t, dtype=torch.bool).index_fill(0, words[0], True)
        clean, judged = z + sigma * (noise - eps), (given & (t < LATEST)).repeat_interleave(2)
        face = self.faces.error(torch.stack(clean.chunk(2, -1), 1).flatten(0, 1), sum(at, []), judged)
        said = {"eps_error": error.mean(), "face_error": face, "elsewhere": elsewhere}
        return self.balance(error, t) + face + PLACES * elsewhere, {k: v.detach() for k, v in said.items()}

    def export(self, out):
        """fp16, in the layout of the public file."""
        weights = {ENCODER + k: v for k, v in self.network.image_encoder.state_dict().items()}
        names = {v: k for k, v in unet_to_diffusers(load.LabConfig(load.UNET).unet_config).items()}
        for key, value in self.average.shadow.items():
            part, rest = key.split(".", 1)
            key = FUSE + rest if part == "fuse" else f"unet.{names[rest.replace('/', '.')]}"
            weights[key] = value
        save_file({k: v.half().contiguous().cpu() for k, v in weights.items()}, out / f"{self.path.stem}.safetensors")


def train(work, budget, batch=32, lr=1e-3, seed=0):
    import comfy.ldm.modules.attention as host

    with swapped(host):
        stage = Trainer(work, seed=seed, lr=lr)
        stage.run(budget, batch)
        stage.export(common.WEIGHTS)
