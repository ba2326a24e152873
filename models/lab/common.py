"""What the training stages share: device, Muon, moving average, checkpoints, progress and log."""

import csv
import functools
from pathlib import Path
from time import process_time

import torch
from tqdm import tqdm

WEIGHTS = Path(__file__).parent / "weights"


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def fast_bf16():
    """Whether bf16 is faster than fp32: a CPU takes 1.4 times as long with AVX-512 alone, a hundred with less."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {"amx_bf16": True}
    return device().type != "cpu" or bool(able.get("amx_bf16") or able.get("bf16"))


def autocast():
    return torch.autocast(device().type, torch.bfloat16, enabled=fast_bf16())


def orthogonalise(g, steps=5):
    """Newton-Schulz iteration towards the orthogonal factor of `g` (Jordan et al., Muon, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if fast_bf16() else g.float()
    x = x.mT if g.shape[0] > g.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if g.shape[0] > g.shape[1] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for weights (convolutions as matrices), AdamW for the rest, in one optimiser.

    The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)) so that both halves share one learning
    rate (Liu et al., "Muon is scalable for LLM training", 2025).
    """

    def __init__(self, matrices, others, lr, momentum=0.95, betas=(0.9, 0.99)):
        groups = [dict(params=list(matrices), muon=True), dict(params=list(others), muon=False)]
        super().__init__(groups, dict(lr=lr, momentum=momentum, betas=betas))

    def set_rate(self, lr):
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self._direction(p, group), alpha=-group["lr"])

    def _direction(self, p, group):
        state, g = self.state[p], p.grad
        if group["muon"]:
            m = state.setdefault("m", torch.zeros_like(g)).mul_(group["momentum"]).add_(g)
            nesterov = g.add(m, alpha=group["momentum"]).flatten(1)
            return orthogonalise(nesterov).view_as(p) * (0.2 * max(nesterov.shape) ** 0.5)
        b1, b2 = group["betas"]
        state["t"] = state.get("t", 0) + 1
        m = state.setdefault("m", torch.zeros_like(g)).lerp_(g, 1 - b1)
        v = state.setdefault("v", torch.zeros_like(g)).lerp_(g * g, 1 - b2)
        return (m / (1 - b1 ** state["t"])) / ((v / (1 - b2 ** state["t"])).sqrt() + 1e-8)


def split(named, adam=()):
    """Named parameters -> (matrices for Muon, others for Adam); names holding a word of `adam` go to Adam."""
    matrices, others = [], []
    for name, p in named:
        (others if p.ndim < 2 or any(word in name for word in adam) else matrices).append(p)
    return matrices, others


class Average:
    """Exponential moving average of a state dict, with a warm-up so that early weights fade."""

    def __init__(self, model, decay=0.999):
        self.decay, self.steps = decay, 0
        self.shadow = {k: v.detach().clone().float() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for k, v in model.state_dict().items():
            self.shadow[k].lerp_(v.float(), 1 - decay) if v.is_floating_point() else self.shadow[k].copy_(v)


def save(path, **state):
    """Write a checkpoint so that an interruption never leaves half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def restore(path):
    path = Path(path)
    return torch.load(path, map_location=device(), weights_only=True) if path.exists() else None


class Log:
    """Progress bar plus a CSV in the repository: stage, step, samples, seconds of processor time, name, value."""

    def __init__(self, stage, total, start=0, batch=1, seconds=0.0):
        self.stage, self.batch, self.offset, self.began = stage, batch, seconds, process_time()
        self.bar = tqdm(total=total, initial=start, desc=stage, mininterval=5, dynamic_ncols=True)
        self.path = WEIGHTS / "training.csv"
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("stage,step,samples,seconds,name,value\n")

    @property
    def seconds(self):
        return self.offset + process_time() - self.began

    def write(self, step, **values):
        with self.path.open("a", newline="") as f:
            for name, value in values.items():
                row = [self.stage, step, step * self.batch, round(self.seconds), name, f"{value:.5g}"]
                csv.writer(f, lineterminator="\n").writerow(row)
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})

    def tick(self, step):
        self.bar.update(step - self.bar.n)


def schedule(progress, warm=0.02, hold=0.6):
    """Learning-rate factor over progress in [0, 1]: linear warm-up, constant, linear decay to zero."""
    return min(1.0, progress / warm + 1e-3, (1 - progress) / (1 - hold))
