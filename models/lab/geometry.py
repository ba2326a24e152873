"""Stage "geometry": a judge that reads the face's measures and the factors off latents.

The error of noise hardly knows one face from another, since they differ in few pixels. So adapters are also trained to
please this judge, which looks at their clean estimates, through the first layers of the VAE's decoder: in the latents
alone it hardly finds noses and brows. It learns from other portraits than those it judges, which it would remember in
place of looking. It is not shipped, and nothing is measured by it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from . import common, edit, evaluate, latents, load
from .portrait import GEOMETRY, Portrait, draw
from .reader import SIZES
from .stage import Stage

COUNT = 8000  # portraits to learn from
LAYERS = 11  # of the decoder, up to a quarter of the picture's size
NOISE = 0.1  # highest standard deviation of what is added to the latents, as a share of theirs
MEASURES = 2.0  # weight of their error


def portraits(count=COUNT):
    return [Portrait.from_seed(edit.PAIRS + n) for n in range(count)]


def build(work, count=COUNT):
    """Draw and encode them -> `work`/faces.npy, float16 [count, 4, 16, 16], as the VAE gives them; resumable."""
    path = work / "faces.npy"
    if not path.exists():
        np.lib.format.open_memmap(path, "w+", np.float16, (count, 4, 16, 16)).flush()
    out, model = np.load(path, mmap_mode="r+"), evaluate.taesd()
    drawn = portraits(len(out))
    for start in tqdm(range(0, len(out), 10), desc="faces", mininterval=5):
        block = slice(start, start + 10)
        if not out[block][-1].any():
            out[block] = latents.encode(model, np.stack([draw(p) for p in drawn[block]]))
    out.flush()


def eyes(latent_format):
    """-> function: latents [B, 4, 16, 16] in that format -> what the VAE's decoder makes of them, [B, 64, 32, 32]."""
    layers = nn.Sequential(*list(evaluate.taesd().taesd_decoder)[:LAYERS]).to(common.device()).requires_grad_(False)
    return lambda z: layers(latent_format.process_out(z))


def _stage(n_in, n_out, stride=1):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [(64, 96, 2), (96, 96), (96, 160, 2), (160, 160), (160, 192, 2)]
        self.trunk = nn.Sequential(*[_stage(*w) for w in widths], nn.Conv2d(192, 48, 1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(48 * 16, 384), nn.ReLU())
        self.factors, self.geometry = nn.Linear(384, sum(SIZES)), nn.Linear(384, len(GEOMETRY))

    def forward(self, seen):
        """What the `eyes` see -> (logits of the factors [B, sum(SIZES)], measures [B, 6])."""
        hidden = self.hidden(self.trunk(seen))
        return self.factors(hidden).float(), self.geometry(hidden).float()


class Geometry(Stage):
    def __init__(self, work, seed=0, lr=2e-3):
        torch.manual_seed(seed)
        super().__init__(work, "geometry", Judge(), ("factors", "geometry", "trunk.0."), seed, lr)
        latent_format = load.LabLatent(load.latent_stats("unet"))
        z = torch.from_numpy(np.load(work / "faces.npy")).float().to(common.device())
        self.z, self.eyes, drawn = latent_format.process_in(z), eyes(latent_format), portraits(len(z))
        self.measures = torch.tensor([p.geometry for p in drawn]).float().to(self.z.device)
        self.named = torch.tensor([p.indices for p in drawn]).to(self.z.device)

    def loss(self, size):
        at = torch.randint(len(self.z), (size,), device=self.z.device)
        noise = NOISE * load.LATENT_STD * torch.rand(size, 1, 1, 1, device=self.z.device)
        with common.autocast():
            factors, measured = self.model(self.eyes(self.z[at] + noise * torch.randn_like(self.z[at])))
        split = factors.split(SIZES, 1)
        words = sum(F.cross_entropy(v, self.named[at, i]) for i, v in enumerate(split)) / len(split)
        error = (measured - self.measures[at]).square().mean()
        return words + MEASURES * error, {"geometry_error": error.detach()}


def train(work, budget, batch=32, seed=0):
    build(work)
    Geometry(work, seed).run(budget, batch)


class Faces:
    """The trained judge, for clean estimates of `portraits` in latents of a format."""

    def __init__(self, work, portraits, latent_format):
        state = common.restore(work / "geometry.ckpt")
        if state is None:
            raise FileNotFoundError(f"{work} has no geometry.ckpt; run the stage geometry before.")
        self.judge = Judge().to(common.device())
        self.judge.load_state_dict(state["model"])
        self.judge.eval().requires_grad_(False)
        self.measures = torch.tensor([p.geometry for p in portraits]).float().to(common.device())
        self.eyes = eyes(latent_format)

    def error(self, clean, at, judged):
        """Mean squared error of the measures in clean [B, 4, 16, 16] of the portraits `at`, where `judged` [B]."""
        if not judged.any():
            return clean.sum() * 0
        with common.autocast():
            read = self.judge(self.eyes(clean[judged]))[1]
        return (read - self.measures[at][judged]).square().mean()
