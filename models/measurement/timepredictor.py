"""Time predictors: a small network tells how noisy a latent is (Park et al. 2025, arXiv 2510.11057, E.4)."""

import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (32, 64, 128, 256)
KINDS = ("eps", "flow")


class Network(nn.Module):
    """The paper's: convolutions, ReLU and mean pooling in turns, the last over all places, then one linear layer."""

    def __init__(self, channels, levels, widths=WIDTHS):
        super().__init__()
        pairs = zip((channels, *widths), widths, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in pairs)
        self.out = nn.Linear(widths[-1], levels)

    def forward(self, x):
        """x [n, C, H, W], as a diffusion network takes it -> logits [n, levels]."""
        for convolution in self.convolutions[:-1]:
            x = F.avg_pool2d(F.relu(convolution(x)), 2, ceil_mode=True)
        return self.out(F.relu(self.convolutions[-1](x)).mean((2, 3)))


@dataclass(frozen=True)
class Learned:
    """A trained `Network`, as a value on the socket STEER_TIME_PREDICTOR: a `TimePredictor` (scorer.py).

    patcher: the host's ModelPatcher of it.  digest: tells files of one name apart.
    """

    name: str
    kind: str
    channels: int
    digest: str
    levels: torch.Tensor = field(compare=False, repr=False)
    patcher: Any = field(compare=False, repr=False)

    @property
    def patchers(self):
        return (self.patcher,)

    def __call__(self, x):
        network = self.patcher.model
        return network(x.to(network.out.weight.device)).log_softmax(1).to(x.device)

    def __str__(self):
        models = {"eps": "eps and v models", "flow": "flow models"}[self.kind]
        return f"{self.name}: {len(self.levels)} noise levels of {models} with {self.channels} channels"


def state_dict(weights, levels, kind):
    """What a file holds: weights of a `Network` in fp16, and its noise levels [T] under the name of their kind."""
    return {f"levels.{kind}": levels.float()} | {k: v.half().contiguous().cpu() for k, v in weights.items()}


def load(path):
    """The `Learned` of a safetensors file that `state_dict` describes; ValueError, naming it, where it is none."""
    from ..identity import files

    return from_state_dict(files.read(str(path)), os.path.basename(path))


def from_state_dict(sd, name):
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher

    from ...patches.shared.conditioning import digest

    kind = next((kind for kind in KINDS if f"levels.{kind}" in sd), None)
    if kind is None:
        raise ValueError(
            f"{name} is no time predictor: it has no levels.eps or levels.flow, but keys such as "
            f"{', '.join(sorted(sd)[:3])}. The help page says what such a file holds."
        )
    with torch.inference_mode(False):  # nodes run in inference mode, whose tensors refuse gradients later
        sd = {key: value.clone().float() for key, value in sd.items()}
        levels = sd.pop(f"levels.{kind}")
        widths = [len(sd[key]) for key in sorted(sd) if re.fullmatch(r"convolutions\.\d\.weight", key)]
        if levels.ndim != 1 or len(levels) < 2 or not bool((levels[1:] > levels[:-1]).all()) or not widths:
            raise ValueError(f"{name} is no time predictor: levels.{kind} must rise, and there must be convolutions.")
        channels = sd["convolutions.0.weight"].shape[1]
        network = Network(channels, len(levels), widths)
        try:
            network.load_state_dict(sd)
        except RuntimeError as error:
            raise ValueError(f"{name} looks like a time predictor, but its weights do not fit: {error}") from None
        network.eval().requires_grad_(False)
    patcher = ModelPatcher(network, mm.get_torch_device(), mm.unet_offload_device())
    return Learned(name, kind, channels, digest(network.state_dict()), levels, patcher)
