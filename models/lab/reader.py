"""The reader: what a portrait shows, whose face it is, and how well it fits a prompt.

    factors   a distribution over each discrete factor of FACTORS
    geometry  the six continuous face measures, in [-1, 1]
    identity  512-d unit vector trained on the geometry alone: two pictures of one face are close whatever they wear
    score     mean log-probability of the factors that a prompt names; differentiable in the picture
Needs torch only. Input everywhere: images [B, 3, 128, 128] in [0, 1].
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .captions import parse
from .portrait import FACTORS, GEOMETRY, SIZE

WEIGHTS = Path(__file__).parent / "weights" / "reader.safetensors"
SIZES = [len(values) for values in FACTORS.values()]


def _stage(n_in, n_out, stride):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [(3, 24, 2), (24, 48, 2), (48, 96, 2), (96, 96, 1), (96, 160, 2), (160, 160, 1), (160, 256, 2)]
        self.trunk = nn.Sequential(*[_stage(*w) for w in widths], nn.Conv2d(256, 48, 1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(48 * 16, 384), nn.ReLU())
        self.factors, self.geometry = nn.Linear(384, sum(SIZES)), nn.Linear(384, len(GEOMETRY))
        self.face = nn.Sequential(nn.Linear(48 * 16, 256), nn.ReLU(), nn.Linear(256, 512))

    def forward(self, images):
        """-> (list of logits [B, values] per factor, geometry [B, 6], identity [B, 512])."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="area")
        features = self.trunk(images * 2 - 1)
        hidden = self.hidden(features)
        identity = F.normalize(self.face(features).float(), dim=-1)
        return self.factors(hidden).float().split(SIZES, 1), self.geometry(hidden).float(), identity

    def features(self, images):
        """What it sees at each of 16x16 places [B, 256, 96], and at all [B, 384]."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="area")
        places = self.trunk[:4](images * 2 - 1)
        return places.flatten(2).mT, self.hidden(self.trunk[4:](places))

    @torch.no_grad()
    def read(self, images):
        """-> per image {factor: (value, probability)}."""
        rows = [{} for _ in images]
        for (name, values), logits in zip(FACTORS.items(), self(images)[0], strict=True):
            best = logits.softmax(1).max(1)
            for row, probability, at in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                row[name] = (values[at], probability)
        return rows

    def score(self, images, prompt):
        """How well each image fits the factors that `prompt` names: mean log-probability [B], 0 is a perfect fit."""
        said = parse(prompt)
        if not said:
            raise ValueError(f"the prompt {prompt!r} names no factor of the lab's world, so there is nothing to score")
        logits = dict(zip(FACTORS, self(images)[0], strict=True))
        terms = [logits[name].log_softmax(1)[:, FACTORS[name].index(value)] for name, value in said.items()]
        return torch.stack(terms).mean(0)


def load_reader():
    """The trained reader in fp32, in evaluation mode; gradients can pass through it to the picture."""
    from safetensors.torch import load_file

    with torch.inference_mode(False):  # nodes run in inference mode, whose tensors refuse gradients later
        reader = Reader()
        reader.load_state_dict({k: w.float() if w.is_floating_point() else w for k, w in load_file(WEIGHTS).items()})
        return reader.eval().requires_grad_(False)
