"""Stage "latents": encode the training portraits once; measure the moments that LabLatent whitens with."""

import json

import numpy as np
import torch
from tqdm import tqdm

from . import common, data, vae


def build(work, part=(0, 1)):
    """`work`/vae.ckpt, portraits.npy -> `work`/latents.npy, float16 [N, 4, 16, 16]; resumable.

    `part` = (i, n) encodes every n-th block of 100 from block i, so that several processes can share the work.
    """
    model = vae.network()
    model.load_state_dict(common.restore(work / "vae.ckpt")["average"])
    images = data.images(work)
    path = work / "latents.npy"
    if not path.exists():
        np.lib.format.open_memmap(path, "w+", np.float16, (len(images), 4, 16, 16)).flush()
    out = np.load(path, mmap_mode="r+")
    blocks = [b for b in range(0, len(images), 100)][part[0] :: part[1]]
    for start in tqdm(blocks, desc="latents", mininterval=5):
        if out[start + 99, 0].any():
            continue
        encoded = [encode(model, images[i : i + 10]) for i in range(start, start + 100, 10)]
        out[start : start + 100] = np.concatenate(encoded)
    out.flush()


@torch.no_grad()
def encode(model, pictures):
    x = data.to_tensor(pictures, common.device()).contiguous(memory_format=torch.channels_last)
    with common.autocast():
        return model.encode(x).float().cpu().numpy()


def ready(work):
    """(latents of all blocks encoded so far, their seeds); float16 [M, 4, 16, 16]."""
    z = np.load(work / "latents.npy")
    seeds = np.flatnonzero(z[:, 0, 0, 0].astype(bool) | z[:, 0, 8, 8].astype(bool))
    return z[seeds], seeds


def moments(work):
    """Mean and std per channel, and the linear map from whitened latents to colours for previews; kept on disk."""
    path = work / "latents.json"
    if not path.exists():
        from .load import LATENT_STD

        z, seeds = ready(work)
        z, images = z[:2000].astype(np.float32), data.images(work)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        white = ((z - mean[:, None, None]) / std[:, None, None] * LATENT_STD).transpose(0, 2, 3, 1).reshape(-1, 4)
        cells = np.stack([images[s] for s in seeds[:2000]]).reshape(-1, 16, 8, 16, 8, 3).mean((2, 4))
        affine = np.concatenate([white, np.ones_like(white[:, :1])], 1)
        fit = np.linalg.lstsq(affine, cells.reshape(-1, 3) / 127.5 - 1, rcond=None)[0]
        stats = dict(mean=mean.tolist(), std=std.tolist(), rgb_factors=fit[:4].tolist(), rgb_bias=fit[4].tolist())
        data.write_json(path, {k: np.round(v, 5).tolist() for k, v in stats.items()})
    return json.loads(path.read_text())
