"""Stage "data": draw the training portraits once into a memory-mapped file."""

import json
import random
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from .portrait import FACTORS, SIZE, Portrait, draw

HELD_OUT = 10_000_000  # seeds from here on are never trained on


def build(work, count):
    """Draw portraits of seeds 0..count-1 -> `work`/portraits.npy, uint8 [count, 128, 128, 3]."""
    path = work / "portraits.npy"
    if path.exists() and len(np.load(path, mmap_mode="r")) == count:
        return
    work.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npy")
    images = np.lib.format.open_memmap(part, "w+", np.uint8, (count, SIZE, SIZE, 3))
    for seed in tqdm(range(count), desc="data", mininterval=2):
        images[seed] = draw(Portrait.from_seed(seed))
    images.flush()
    part.replace(path)


def images(work):
    return np.load(work / "portraits.npy", mmap_mode="r")


def held_out(count, start=0):
    """Portraits that no stage trains on, with their pictures: (list of Portrait, uint8 [count, 128, 128, 3])."""
    portraits = [Portrait.from_seed(HELD_OUT + start + i) for i in range(count)]
    return portraits, np.stack([draw(p) for p in portraits])


def edit(seed):
    """(a portrait, the same with one factor changed, the name of that factor)."""
    rng, source = random.Random(f"edit {seed}"), Portrait.from_seed(seed)
    name = rng.choice(list(FACTORS))
    value = rng.choice([value for value in FACTORS[name] if value != getattr(source, name)])
    return source, replace(source, **{name: value}), name


def to_tensor(array, device):
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(array)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")
