"""Stage "reader": train the reader on pairs of pictures of one face, sharp, degraded and through the VAE."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import common, data, vae
from .portrait import GEOMETRY, SIZE, Portrait, draw
from .reader import Reader

PAIRS, FIRST = 6000, 5_000_000  # seeds of the reader's own pictures
THROUGH_VAE = 1000  # pairs that also exist as reconstructions


def pair(seed):
    """Two portraits that share the face geometry and nothing else."""
    one, other = Portrait.from_seed(2 * seed), Portrait.from_seed(2 * seed + 1)
    return one, replace(other, **{name: getattr(one, name) for name in GEOMETRY})


def build(work):
    """Draw the pairs -> `work`/pairs.npy, uint8 [PAIRS, 2, 128, 128, 3]."""
    path = work / "pairs.npy"
    if not path.exists():
        part = path.with_suffix(".part.npy")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (PAIRS, 2, SIZE, SIZE, 3))
        for i in tqdm(range(PAIRS), desc="pairs", mininterval=5):
            out[i] = [draw(p) for p in pair(FIRST + i)]
        out.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def reconstruct(model, pictures, noise=0.0):
    """uint8 pictures through the VAE, as the host decodes them; `noise` is added to the latents."""
    out = []
    for start in range(0, len(pictures), 8):
        x = data.to_tensor(pictures[start : start + 8], common.device()).contiguous(memory_format=torch.channels_last)
        with common.autocast():
            z = model.encode(x)
            y = model.decode(z + noise * torch.randn_like(z) * torch.rand(len(z), 1, 1, 1, device=z.device))
        out.append(((y.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(out)


def build_reconstructions(work):
    """`work`/pairs-vae.npy: the first THROUGH_VAE pairs with up to 0.15 of latent noise, as samples are not perfect."""
    path = work / "pairs-vae.npy"
    if not path.exists():
        model, pairs = vae.network(), build(work)
        model.load_state_dict(common.restore(work / "vae.ckpt")["average"])
        blocks = [pairs[i : i + 8].reshape(-1, SIZE, SIZE, 3) for i in range(0, THROUGH_VAE, 8)]
        out = [reconstruct(model, block, 0.15) for block in tqdm(blocks, desc="pairs-vae", mininterval=5)]
        np.save(path, np.concatenate(out).reshape(-1, 2, SIZE, SIZE, 3))
    return np.load(path, mmap_mode="r")


def degrade(x):
    """Blur half of the images, then light noise and a small change of brightness and contrast; [0, 1] images."""
    b = len(x)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    strength = (torch.rand(b, 1, 1, 1, device=x.device) * 2 - 1).clamp(min=0)
    x = x + strength * (soft - x)
    x = x + 0.06 * torch.rand(b, 1, 1, 1, device=x.device) * torch.randn_like(x)
    gain = 1 + 0.1 * (torch.rand(b, 1, 1, 1, device=x.device) - 0.5)
    return (x * gain + 0.06 * (torch.rand(b, 3, 1, 1, device=x.device) - 0.5)).clamp(0, 1)


def loss_of(model, x, factors, geometry):
    """x [2P, 3, 128, 128]: rows i and i + P show one face."""
    with common.autocast():
        logits, measured, identity = model(x)
    words = sum(F.cross_entropy(v, factors[:, i]) for i, v in enumerate(logits)) / len(logits)
    half = len(x) // 2
    similar = identity[:half] @ identity[half:].T / 0.1
    same = torch.arange(half, device=x.device)
    faces = (F.cross_entropy(similar, same) + F.cross_entropy(similar.T, same)) / 2
    return words + 2 * F.smooth_l1_loss(measured, geometry) + 0.3 * faces


def train(work, steps, batch=32, lr=2e-3, seed=0, through_vae=0.0, start="reader", name="reader"):
    """`batch` pairs per step, a share `through_vae` of them reconstructions; goes on from the checkpoint `start`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pairs, rebuilt = build(work), build_reconstructions(work) if through_vae else None
    labels = [pair(FIRST + i) for i in range(PAIRS)]
    factors = torch.tensor([[p.indices for p in two] for two in labels])
    geometry = torch.tensor([[p.geometry for p in two] for two in labels], dtype=torch.float32)
    model = Reader().to(common.device(), memory_format=torch.channels_last)
    state = common.restore(work / f"{start}.ckpt")
    if state:
        model.load_state_dict(state["model"])
    optimiser = common.Muon(*common.split(model.named_parameters(), ("factors", "geometry", "trunk.0.")), lr=lr)
    log, average = common.Log(name, steps, batch=2 * batch), common.Average(model, 0.995)
    model.train()
    for step in range(1, steps + 1):
        through = rng.random(batch) < through_vae
        rows = np.where(through, rng.integers(THROUGH_VAE, size=batch), rng.integers(PAIRS, size=batch))
        pictures = np.stack([(rebuilt if v else pairs)[r] for r, v in zip(rows, through, strict=True)], 1)
        x = (data.to_tensor(pictures.reshape(-1, SIZE, SIZE, 3), common.device()) + 1) / 2
        x = degrade(x).contiguous(memory_format=torch.channels_last)
        at = torch.from_numpy(rows)
        optimiser.set_rate(lr * common.schedule(step / (steps + 1), hold=0.4))
        optimiser.zero_grad(set_to_none=True)
        targets = (t[at].transpose(0, 1).flatten(0, 1).to(x.device) for t in (factors, geometry))
        loss = loss_of(model, x, *targets)
        loss.backward()
        optimiser.step()
        average.update(model)
        log.tick(step)
        if step % 100 == 0 or step == steps:
            log.write(step, loss=loss.item())
            common.save(work / f"{name}.ckpt", model=average.shadow, step=step)
