"""Stage "geometry": a judge that reads the face's measures and the factors off latents.

The error of noise hardly knows one face from another, since they differ in few pixels. So adapters are also trained to
please this judge, which looks at their clean estimates. It is not shipped, and nothing is measured by it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import common, data, load
from .portrait import GEOMETRY
from .reader import SIZES
from .stage import Stage

NOISE = 0.1  # highest standard deviation of what is added to latents of a standard deviation of 1
MEASURES = 2.0  # weight of their error


def _stage(n_in, n_out, stride=1):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [(4, 64), (64, 96), (96, 96), (96, 160, 2), (160, 160), (160, 192, 2)]
        self.trunk = nn.Sequential(*[_stage(*w) for w in widths], nn.Conv2d(192, 48, 1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(48 * 16, 384), nn.ReLU())
        self.factors, self.geometry = nn.Linear(384, sum(SIZES)), nn.Linear(384, len(GEOMETRY))

    def forward(self, latents):
        """latents [B, 4, 16, 16], whitened -> (logits of the factors [B, sum(SIZES)], measures [B, 6])."""
        hidden = self.hidden(self.trunk(latents))
        return self.factors(hidden).float(), self.geometry(hidden).float()


class Geometry(Stage):
    def __init__(self, work, seed=0, lr=2e-3):
        torch.manual_seed(seed)
        super().__init__(work, "geometry", Judge(), ("factors", "geometry", "trunk.0."), seed, lr)
        base = load.unet_model(load.latent_stats("unet"))
        latents = torch.from_numpy(np.load(work / "edits.npy")).float()
        portraits = [p for n in range(len(latents)) for p in data.edit(n)[:2]]
        to_unit = base.latent_format
        self.z = (to_unit.process_in(latents.flatten(0, 1)) / to_unit.scale).to(common.device())
        self.measures = torch.tensor([p.geometry for p in portraits]).float().to(self.z.device)
        self.named = torch.tensor([p.indices for p in portraits]).to(self.z.device)

    def loss(self, size):
        at = torch.randint(len(self.z), (size,), device=self.z.device)
        z = self.z[at]
        z = z + NOISE * torch.rand(size, 1, 1, 1, device=z.device) * torch.randn_like(z)
        with common.autocast():
            factors, measured = self.model(z)
        split = factors.split(SIZES, 1)
        words = sum(F.cross_entropy(v, self.named[at, i]) for i, v in enumerate(split)) / len(split)
        error = (measured - self.measures[at]).square().mean()
        return words + MEASURES * error, {"geometry_error": error.detach()}


def train(work, budget, batch=32, seed=0):
    Geometry(work, seed).run(budget, batch)


class Faces:
    """The trained judge, for clean estimates of `portraits` in latents of the standard deviation `scale`."""

    def __init__(self, work, portraits, scale):
        state = common.restore(work / "geometry.ckpt")
        if state is None:
            raise FileNotFoundError(f"{work} has no geometry.ckpt; run the stage geometry before.")
        self.judge = Judge().to(common.device())
        self.judge.load_state_dict(state["model"])
        self.judge.eval().requires_grad_(False)
        self.measures = torch.tensor([p.geometry for p in portraits]).float().to(common.device())
        self.scale = scale

    def error(self, clean, at, judged):
        """Mean squared error of the measures in clean [B, 4, 16, 16] of the portraits `at`, where `judged` [B]."""
        if not judged.any():
            return clean.sum() * 0
        with common.autocast():
            read = self.judge(clean[judged] / self.scale)[1]
        return (read - self.measures[at][judged]).square().mean()
