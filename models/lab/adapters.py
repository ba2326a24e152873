"""Stage "adapter": an IP-Adapter (Ye et al. 2023, 2308.06721) for the exported Lab-UNet, which is frozen; and what the
stages "faceid" and "instantid" have in common with it.

    adapter.safetensors   layout of the public plus files; takes what the lab's image encoder sees

Keys and values begin as the UNet's own for the text. The plus adapter is first taught to say of a portrait what the
text encoder makes of its caption, which costs next to nothing; then all learn from the eps error and from what a judge
of faces says of their clean estimates under guidance (geometry.py). What the text names may differ from the reference:
there the text is right. A share of the pictures are the network's own, under way (drawing.py).
"""

from dataclasses import replace

import numpy as np
import torch
from comfy.ops import disable_weight_init
from safetensors.torch import load_file

from ...patches.shared.reference import in_file_order
from ..identity import projectors
from ..identity.adapter import Network
from . import common, data, edit, geometry, load, vision
from .captions import parse, phrases, random_phrases
from .drawing import Drawings
from .portrait import FACTORS, Portrait, draw
from .stage import Stage
from .text import Vocabulary
from .unet import Balance, plain_attention, swapped

TOKENS, DEPTH, WIDTH = 16, 3, 128  # of the resampler
SAY = 0.15  # share of the training of "adapter" that is spent on captions
CAPTIONS = 3000  # portraits whose captions it learns to say
PHRASE = (0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 7)  # of the caption that names each factor
SAID = len(FACTORS) + 2  # tokens that say something: one for each factor, two for the end; the others are free
NO_IMAGE, NO_TEXT, AGREES = 0.12, 0.2, 0.1  # shares; what remains has a text that differs from the reference
LATEST = 950  # time after which the clean estimate shows no face to judge
FACE = 4.0  # weight of what the judge says: beside the eps error its gradient is three times smaller, and less noisy
DRAWN = 0.5  # share of a batch that the network draws itself
CFG = 5.0  # the judge looks at what comes out under a guidance of up to this, which exaggerates faces


def resampler_shapes():
    """Shapes of the keys below image_proj of the plus layout."""
    text, seen, w = load.TEXT["hidden_size"], load.VISION["hidden_size"], WIDTH
    shapes = {"latents": (1, TOKENS, w), "proj_in.weight": (w, seen), "proj_out.weight": (text, w)}
    for i in range(DEPTH):
        shapes |= {f"layers.{i}.0.to_q.weight": (w, w), f"layers.{i}.1.1.weight": (4 * w, w)}
    return shapes


def initialise(projector):
    """Branches of the layers start at zero."""
    for name, p in projector.named_parameters():
        if p.ndim < 2:
            torch.nn.init.constant_(p, float("norm" in name and name.endswith("weight") or ".1.0.weight" in name))
        elif name.endswith(("to_out.weight", ".1.3.weight")):
            torch.nn.init.zeros_(p)
        else:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return projector


def cross(unet):
    """[(block, its cross-attention)] in the order of the files."""
    return [(tuple(layer), attention) for layer, _, attention in in_file_order(unet)]


def examples(stage, size):
    """A batch for an adapter: (places of portraits, latents, rows of texts, references, which of them are given)."""
    at = stage.rng.choices(range(len(stage.z)), k=size)
    chosen = [stage.choose(stage.portraits[i]) for i in at]
    rows = torch.tensor([stage.vocabulary.encode(parts) for parts, _ in chosen], device=stage.z.device)
    given = torch.tensor([p is not None for _, p in chosen], device=stage.z.device)
    return at, stage.z[at], rows, [p or stage.portraits[0] for _, p in chosen], given


class Trainer(Stage):
    """A subclass says what `projector` is, and makes `reference`s.

    adam: as of `Stage`.
    """

    adam = ("latents",)

    def __init__(self, work, name, projector, seed, lr):
        device = common.device()
        self.base = load.unet_model(load.latent_stats("unet")).to(device)
        unet = self.base.diffusion_model
        unet.load_state_dict({k: v.float() for k, v in load_file(load.WEIGHTS / load.MODELS["unet"]).items()})
        unet.requires_grad_(False)
        self.unet, self.vocabulary, self.encoder = unet._forward, Vocabulary(), edit.text_encoder()
        self.blocks, attentions = zip(*cross(unet), strict=True)
        layers = [torch.nn.ModuleDict({f"{key}_ip": torch.nn.Linear(*getattr(a, key).weight.shape[::-1], bias=False)
                                       for key in ("to_k", "to_v")}) for a in attentions]
        model = Network(initialise(projector), layers)
        for key, part in self.parts().items():
            model.add_module(key, part)
        model.requires_grad_(True)
        with torch.no_grad():
            for layer, a in zip(layers, attentions, strict=True):
                layer["to_k_ip"].weight.copy_(a.to_k.weight)
                layer["to_v_ip"].weight.copy_(a.to_v.weight)
        self.balance = Balance()
        self.balance.mean.fill_(0.02)
        super().__init__(work, name, model, self.adam, seed, lr, kept={"balance": self.balance.mean})
        latents = torch.from_numpy(np.load(work / "edits.npy")).float().to(device)
        self.z = self.base.latent_format.process_in(latents.flatten(0, 1))
        self.portraits = [p for n in range(len(latents)) for p in data.edit(n)[:2]]
        self.faces = geometry.Faces(work, self.portraits, self.base.latent_format)
        self.drawings = Drawings(self.example, self.base.model_sampling.sigmas, self.rng)

    def example(self):
        """What `Drawings` takes, of a portrait of which text and reference tell everything."""
        while True:
            at = self.rng.randrange(len(self.z))
            parts, looked = self.choose(self.portraits[at])
            if looked and replace(looked, **parse(", ".join(parts))) == self.portraits[at]:
                return at, self.z[at], torch.tensor(self.vocabulary.encode(parts), device=self.z.device), looked

    def parts(self):
        """{name: network} that is trained beside projector and layers, on the device."""
        return {}

    def control(self, x, t, tokens, portraits):
        """What a ControlNet adds to the UNet that draws `portraits`, as the host takes it; None for nothing."""
        return None

    def reference(self, portraits, given):
        """What the projector takes of portraits, one where `given` and nothing elsewhere."""
        raise NotImplementedError

    def choose(self, portrait):
        """-> (caption parts, the portrait to look at or None)."""
        raise NotImplementedError

    def add(self, tokens):
        """transformer_options that add attention to `tokens` [B, T, D] in every cross-attention (equation 5)."""

        def replacement(layer):
            k, v = layer["to_k_ip"](tokens), layer["to_v_ip"](tokens)

            def attend(q, key, value, extra):
                n = extra["n_heads"]
                return plain_attention(q, key, value, n) + plain_attention(q, k, v, n)

            return attend

        made = {block: replacement(layer) for block, layer in zip(self.blocks, self.model.layers, strict=True)}
        return {"patches_replace": {"attn2": made}}

    def loss(self, size):
        at, z, rows, looked, given = examples(self, size)
        sampling = self.base.model_sampling
        t = ((torch.randperm(size) + torch.rand(size)) * (1000 / size)).long().clamp(max=999).to(z.device)
        shown = z + sampling.sigmas[t].view(-1, 1, 1, 1) * torch.randn_like(z)
        drawn = self.drawings.some(int(DRAWN * size))
        for n, one in enumerate(drawn.values()):
            at[n], rows[n], looked[n], shown[n], t[n] = one
        given[: len(drawn)] = True
        z, sigma = self.z[at], sampling.sigmas[t].view(-1, 1, 1, 1)
        noise = (shown - z) / sigma
        x = sampling.calculate_input(sigma, shown)
        portraits = [self.portraits[i] for i in at]
        with common.autocast():
            tokens = self.model.image_proj(self.reference(looked, given))
            eps = self.eps(x, t, rows, tokens, portraits)
            with torch.no_grad():
                empty = torch.tensor(self.vocabulary.encode([]), device=rows.device).expand_as(rows)
                nobody = self.model.image_proj(self.reference(looked[:1], torch.zeros_like(given[:1])))
                blank = self.eps(x, t, empty, nobody.expand_as(tokens), portraits)
        error = (eps - noise).square().mean((1, 2, 3))
        cfg = 1 + (CFG - 1) * torch.rand(size, 1, 1, 1, device=z.device)
        guided = blank + cfg * (eps - blank)
        face = self.faces.error(z + sigma * (noise - guided), at, given & (t < LATEST))
        for n, number in enumerate(drawn):
            self.drawings.go_on(number, guided[n].detach())
        said = {"eps_error": error.detach().mean(), "face_error": face.detach()}
        return self.balance(error, t) + FACE * face, said

    def eps(self, x, t, rows, tokens, portraits):
        """The noise that the UNet sees in x, which shows `portraits`, by rows of texts and the tokens beside them."""
        control, options = self.control(x, t, tokens, portraits), self.add(tokens)
        return self.unet(x, t.float(), self.encoder(rows), control=control, transformer_options=options).float()

    def files(self):
        found = {}
        for name in self.model.state_dict():
            part, n, *rest = name.split(".")
            if part == "image_proj":
                found[name] = name
            elif part in ("layers", "lora"):
                found[f"ip_adapter.{n if part == 'lora' else 2 * int(n) + 1}.{'.'.join(rest)}"] = name
        return {f"{self.path.stem}.safetensors": found}


class Plus(Trainer):
    until = SAY  # share of the training after which it can say captions

    def __init__(self, work, name="adapter", seed=0, lr=2e-3):
        torch.manual_seed(seed)
        super().__init__(work, name, projectors.Resampler(resampler_shapes(), disable_weight_init), seed, lr)
        weights = load_file(load.WEIGHTS / "vision.safetensors")
        self.vision = vision.network().to(common.device()).requires_grad_(False)
        self.vision.load_state_dict({k: v.float() for k, v in weights.items()})
        size = load.VISION["image_size"]
        tower = self.vision.vision_model
        with torch.no_grad():
            zeros = torch.zeros(1, 3, size, size, device=common.device())
            self.nothing = tower(zeros, intermediate_output=-2)[1]
        self.said = None

    @torch.no_grad()
    def seen(self, portraits):
        images = torch.from_numpy(np.stack([draw(p) for p in portraits])).to(common.device()).float() / 255
        with common.autocast():
            return vision.look(self.vision, images)[0].float()

    def reference(self, portraits, given):
        return torch.where(given[:, None, None], self.seen(portraits), self.nothing)

    def choose(self, portrait):
        dice, rng = self.rng.random(), self.rng
        if dice < NO_IMAGE:
            return (random_phrases(portrait, rng) if dice < NO_IMAGE / 2 else []), None
        if dice < NO_IMAGE + NO_TEXT:
            return [], portrait
        if dice < NO_IMAGE + NO_TEXT + AGREES:
            return random_phrases(portrait, rng), portrait
        share = rng.random() ** 2
        told = {name for name in FACTORS if rng.random() < share} | {rng.choice(list(FACTORS))}
        parts = phrases(portrait, told)
        rng.shuffle(parts)
        return parts, replace(portrait, **{name: rng.choice(FACTORS[name]) for name in told})

    def load(self, out):
        super().load(out)
        self.until = 0.0

    def loss(self, size):
        return self.say(8 * size) if self.progress < self.until else super().loss(size)

    def say(self, size):
        """The tokens for a portrait's factors shall be the text encoder's outputs at the words that name them."""
        if self.said is None:
            portraits = [Portrait.from_seed(self.rng.randrange(data.HELD_OUT)) for _ in range(CAPTIONS)]
            parts = [portraits[i : i + 100] for i in range(0, CAPTIONS, 100)]
            self.said = [torch.cat(x) for x in zip(*((self.seen(p), self.words(p)) for p in parts), strict=True)]
        at = self.rng.choices(range(CAPTIONS), k=size)
        states, words = (x[at] for x in self.said)
        with common.autocast():
            tokens = self.model.image_proj(states)[:, :SAID]
        error = (tokens.float() - words).square().mean()
        return error, {"word_error": error.detach()}

    @torch.no_grad()
    def words(self, portraits):
        """[B, SAID, D] of the text encoder, at the last token of each factor's value, and twice after the end."""
        rows = torch.tensor([self.vocabulary.encode(phrases(p)) for p in portraits], device=common.device())
        at = torch.tensor([self.places(p) for p in portraits], device=rows.device)
        return self.encoder(rows)[torch.arange(len(rows), device=rows.device)[:, None], at].float()

    def places(self, portrait):
        parts = phrases(portrait)

        def length(*said):  # the start token, then the phrases
            row = self.vocabulary.encode(said)
            return row.index(self.vocabulary.rows[self.vocabulary.end])

        ends = []
        for name, n in zip(FACTORS, PHRASE, strict=True):
            value = getattr(portrait, name)
            ends.append(length(*parts[:n], parts[n][: parts[n].index(value) + len(value)]) - 1)
        return [*ends, length(*parts), min(length(*parts) + 8, 76)]


def train(work, budget, which=Plus, batch=32, lr=2e-3, seed=0, shipped=False):
    import comfy.ldm.modules.attention as host

    with swapped(host):
        stage = which(work, seed=seed, lr=lr)
        if shipped:
            stage.load(common.WEIGHTS)
        stage.run(budget, batch)
        stage.export(common.WEIGHTS)
