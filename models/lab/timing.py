"""Stages "time" and "time-dit": time predictors for Lab-UNet's noisy latents and for Lab-DiT's."""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..measurement.timepredictor import Network, state_dict
from . import common, data, load
from .stage import Stage

LEVELS = 128  # of the model's time, in which all are as frequent


class Noise:
    """The noise of one of the lab's models: its sigmas over u in [0, 1], and noisy latents as its network sees them."""

    def __init__(self, which):
        stats = load.latent_stats(which)
        self.base = load.dit_model(stats) if which == "dit" else load.unet_model(stats)
        self.sampling, self.kind = self.base.model_sampling, "flow" if which == "dit" else "eps"

    def sigma(self, u):
        return u if self.kind == "flow" else self.sampling.sigma(u * (self.sampling.num_timesteps - 1))

    def levels(self):
        """Sigma in the middle of each level [LEVELS], rising."""
        return self.sigma((torch.arange(LEVELS) + 0.5) / LEVELS)

    def drawn(self, z, seed=None):
        """Latents z [n, 4, 16, 16] of the VAE with noise of n times, spread evenly -> (noisy, levels [n], whole)."""
        generator = None if seed is None else torch.Generator(z.device).manual_seed(seed)
        options = dict(generator=generator, device=z.device)
        u = (torch.randperm(len(z), **options) + torch.rand(len(z), **options)) / len(z)
        sigma = self.sigma(u.cpu()).to(z).view(-1, 1, 1, 1)
        z = self.base.latent_format.process_in(z)
        noisy = self.sampling.noise_scaling(sigma, torch.randn(z.shape, **options), z)
        return self.sampling.calculate_input(sigma, noisy), (u * LEVELS).long().clamp(max=LEVELS - 1)


class Timing(Stage):
    """Cross-entropy of the level (the paper's equation 8)."""

    def __init__(self, work, which="unet", seed=0, lr=2e-3):
        torch.manual_seed(seed)
        self.file, self.noise = load.TIMES[which], Noise(which)
        name = self.file.removesuffix(".safetensors")
        super().__init__(work, name, Network(4, LEVELS), ("out", "convolutions.0."), seed, lr)
        self.z = torch.from_numpy(np.load(work / "edits.npy")).float().flatten(0, 1).to(common.device())

    def loss(self, size):
        noisy, level = self.noise.drawn(self.z[torch.randint(len(self.z), (size,), device=self.z.device)])
        with common.autocast():
            logits = self.model(noisy).float()
        return F.cross_entropy(logits, level), {"time_gap": gaps(logits, level).mean().detach()}

    def export(self, out):
        """fp16 -> `out`/time.safetensors, or time_dit.safetensors."""
        save_file(state_dict(self.average.shadow, self.noise.levels(), self.noise.kind), out / self.file)


def gaps(logits, level):
    """How far the likeliest of the levels [n, LEVELS] lies from `level` [n], in thousandths of the model's time."""
    return (logits.argmax(1) - level).abs() * (1000 / LEVELS)


def train(work, budget, batch=256, seed=0, which="unet"):
    stage = Timing(work, which, seed)
    stage.run(budget, batch)
    stage.export(common.WEIGHTS)


@torch.no_grad()
def score(which, count=256):
    """What the shipped predictor says of `count` unseen portraits with noise: the cross-entropy in nats, and the mean
    gap in thousandths of the time, of all and by quarters of the time from clean to noise."""
    images = torch.from_numpy(data.held_out(count, 6000)[1]).float() / 255
    noisy, level = Noise(which).drawn(load.load_vae().encode(images), seed=0)
    known = load.load_time(which)(noisy)
    far, quarter = gaps(known, level), level * 4 // LEVELS
    found = {"loss": F.nll_loss(known, level), "gap": far.mean()}
    found |= {f"quarter {n + 1}": far[quarter == n].mean() for n in range(4)}
    return {name: round(float(value), 2) for name, value in found.items()}
