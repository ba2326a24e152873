"""Stage "edit": Lab-UNet taught to edit a picture by a text, as InstructPix2Pix (Brooks et al. 2023, 2211.09800).

The image's latent joins the noisy one as four more input channels, whose weights start at zero. Only the encoder and
the middle are trained, from the shipped weights; the decoder stays Lab-UNet's and is not stored twice.
"""

import random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from . import common, data, evaluate, latents, load
from .captions import phrases
from .portrait import FACTORS, draw
from .text import Encoder, Vocabulary
from .unet import Balance, swapped

PAIRS = 5000  # each serves in both directions
TRAINED = ("input_blocks", "middle_block")
NO_IMAGE, NO_TEXT, NEITHER = 0.05, 0.05, 0.05  # section 3.2.1 of the paper


def instruction(edited, name, rng):
    """Caption parts of the edited portrait: the changed factor alone half the time, else with others beside it."""
    keep = 0.0 if rng.random() < 0.5 else rng.random()
    parts = phrases(edited, [n for n in FACTORS if n == name or rng.random() < keep])
    if rng.random() < 0.3:
        rng.shuffle(parts)
    if rng.random() < 0.3:  # without the phrase that says nothing
        parts = [part for part in parts if part != "a portrait of a person"]
    return parts


def build(work, count=PAIRS):
    """Draw and encode pairs -> `work`/edits.npy, float16 [count, 2, 4, 16, 16], as the VAE gives them; resumable."""
    path = work / "edits.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", np.float16, (count, 2, 4, 16, 16)).flush()
    out, model = np.load(path, mmap_mode="r+"), evaluate.taesd()
    for start in tqdm(range(0, len(out), 5), desc="edits", mininterval=5):
        block = range(start, min(start + 5, len(out)))
        if not out[block[-1]].any():
            pictures = np.stack([draw(portrait) for seed in block for portrait in data.edit(seed)[:2]])
            out[start : start + 5] = latents.encode(model, pictures).reshape(-1, 2, 4, 16, 16)
    out.flush()


def text_encoder():
    """The shipped one, on the compact table of tokens."""
    weights = load_file(load.WEIGHTS / "text.safetensors")
    rows = weights["token_rows"]
    state = {k.replace("text_model", "host"): v for k, v in weights.items() if k.startswith("text_model")}
    encoder = Encoder(len(rows))
    encoder.load_state_dict({**state, "host.embeddings.token_embedding.weight": rows})
    return encoder.to(common.device()).requires_grad_(False)


class Trainer:
    """Model, optimiser, data and state of one training run in `work`."""

    def __init__(self, work, name="unet-edit", seed=0, lr=1e-3):
        torch.manual_seed(seed)
        self.work, self.path, self.lr, self.rng = work, work / f"{name}.ckpt", lr, random.Random(seed)
        self.base = load.unet_model(load.latent_stats("unet"), **load.EDIT).to(common.device())
        unet = self.base.diffusion_model
        weights = {k: v.float() for k, v in load_file(load.WEIGHTS / load.MODELS["unet"]).items()}
        first = weights["input_blocks.0.0.weight"]
        weights["input_blocks.0.0.weight"] = torch.cat([first, torch.zeros_like(first)], 1)
        unet.load_state_dict(weights)
        unet.requires_grad_(False)
        self.model = torch.nn.ModuleDict({name: getattr(unet, name) for name in TRAINED}).requires_grad_(True)
        self.unet, self.vocabulary, self.encoder = unet._forward, Vocabulary(), text_encoder()
        self.optimiser = common.Muon(*common.split(self.model.named_parameters(), ("input_blocks.0.",)), lr=lr)
        self.balance, self.average = Balance(), common.Average(self.model, 0.99)
        self.step, self.seconds = 0, 0.0
        state = common.restore(self.path)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average.shadow, self.balance.mean = state["average"], state["balance"]
            self.average.steps, self.step, self.seconds = state["step"], state["step"], state["seconds"]
            self.rng.seed(self.step)
            torch.manual_seed(seed + self.step)
        self.images = torch.from_numpy(np.load(work / "edits.npy")).float().to(common.device())
        self.pairs = [data.edit(seed) for seed in range(len(self.images))]

    def batch(self, size):
        """-> latents of the edited pictures, whitened; of the sources, as the VAE gives them; caption tokens."""
        at, way = self.rng.choices(range(len(self.pairs)), k=size), self.rng.choices((0, 1), k=size)
        image = self.images[at, [1 - to for to in way]]
        parts = [instruction(self.pairs[i][to], self.pairs[i][2], self.rng) for i, to in zip(at, way, strict=True)]
        for n, dice in enumerate(self.rng.random() for _ in range(size)):
            if dice < NO_IMAGE + NEITHER:
                image[n] = 0
            if NO_IMAGE < dice < NO_IMAGE + NEITHER + NO_TEXT:
                parts[n] = []
        z = self.base.latent_format.process_in(self.images[at, way])
        return z, image, torch.tensor([self.vocabulary.encode(p) for p in parts]).to(z.device)

    def loss(self, z, image, rows):
        """z, image [B, 4, 16, 16], rows [B, 77] -> (balanced loss, plain eps error), as of Lab-UNet."""
        sampling, n = self.base.model_sampling, len(z)
        t = ((torch.randperm(n, device=z.device) + torch.rand(n, device=z.device)) * (1000 / n)).long().clamp(max=999)
        sigma, noise = sampling.sigmas[t].view(-1, 1, 1, 1), torch.randn_like(z)
        x = torch.cat([sampling.calculate_input(sigma, z + sigma * noise), image], 1)
        with common.autocast():
            eps = self.unet(x, t.float(), self.encoder(rows), transformer_options={})
        error = (eps.float() - noise).square().mean((1, 2, 3))
        return self.balance(error, t), error.detach().mean()

    def save(self, log):
        state = dict(model=self.model.state_dict(), average=self.average.shadow, optimiser=self.optimiser.state_dict())
        common.save(self.path, **state, balance=self.balance.mean, step=self.step, seconds=log.seconds)

    def run(self, budget, batch):
        """Train until `budget` seconds of training have been spent in all, then the learning rate is zero."""
        log, seen = common.Log(self.path.stem, round(budget), round(self.seconds), batch, self.seconds), []
        while log.seconds < budget:
            self.optimiser.set_rate(self.lr * common.schedule(log.seconds / budget, hold=0.5))
            self.optimiser.zero_grad(set_to_none=True)
            loss, error = self.loss(*self.batch(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.average.update(self.model)
            self.step += 1
            seen.append((loss.detach(), error))
            if self.step % 100 == 0:
                loss, error = torch.tensor(seen).mean(0).tolist()
                log.write(self.step, loss=loss, eps_error=error)
                log.tick(round(log.seconds))
                self.save(log)
                seen = []
        self.save(log)

    def export(self, out):
        """The trained part, fp16 -> `out`/unet_edit.safetensors; load.py lays it over Lab-UNet's weights."""
        weights = {k: v.half().contiguous().cpu() for k, v in self.average.shadow.items()}
        save_file(weights, out / load.MODELS["unet-edit"])


def train(work, budget, batch=32, lr=1e-3, seed=0):
    import comfy.ldm.modules.attention as host

    with swapped(host):
        trainer = Trainer(work, seed=seed, lr=lr)
        trainer.run(budget, batch)
        trainer.export(common.WEIGHTS)
