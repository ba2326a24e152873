"""Masks of a picture on the grid of its latent: 1 may change, 0 stays."""

import torch
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, max_pool2d


def fit(mask, shape):
    """A MASK [b, h, w] on the cells of a latent of `shape` [B, C, (frames,) H, W]: [b, 1, (1,) H, W], between 0 and 1.

    A cell gets the highest value in it, so that no stroke is too thin. ValueError for another aspect or batch.
    """
    if len(shape) not in (4, 5):
        raise ValueError(f"a mask needs the latent of a picture or a video; this one has {len(shape)} dimensions.")
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; it must be [batch, height, width].")
    (b, h, w), (H, W) = mask.shape, shape[-2:]
    if b not in (1, shape[0]):
        raise ValueError(f"there are {b} masks for a batch of {shape[0]}; give one, or one for each.")
    if abs(h * W - w * H) > max(h, w):  # one cell, for sizes that are cut to whole cells
        raise ValueError(
            f"the mask is of another aspect than the picture: {w}x{h}, and the latent is {W}x{H}; give the mask of "
            "this picture."
        )
    if not bool(mask.isfinite().all()):
        raise ValueError("the mask has values that are not finite numbers; use values from 0 to 1.")
    mask = adaptive_max_pool2d(mask.float().clamp(0, 1)[:, None], (H, W))
    return mask if len(shape) == 4 else mask[:, :, None]


def on_tokens(mask, call, pool=adaptive_avg_pool2d):
    """A mask [b, 1, (1,) H, W] on the image tokens of an `AttnCall`, [b, N]: its share of each, or what else `pool`
    makes of the cells of one. ValueError where the tokens do not lie on a grid."""
    frames, *size = call.grid()
    m = pool(mask.reshape(-1, 1, *mask.shape[-2:]).to(call.q.device), size).flatten(1).repeat(1, frames)
    if len(m) not in (1, call.q.shape[0]):
        raise ValueError(f"there are {len(m)} masks for {call.q.shape[0]} pictures in this forward; give one mask.")
    return m


def grow(mask, cells):
    """The mask [b, ..., H, W] wider by `cells` on every side, or narrower where they are negative; the border of the
    picture does not count as outside."""
    if not cells:
        return mask
    size, sign = 2 * abs(cells) + 1, 1 if cells > 0 else -1
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return (sign * max_pool2d(sign * flat, size, 1, abs(cells))).view_as(mask)


def feather(mask, cells):
    """The mask with a ramp of `cells` on the inside of its edge: what is 0 stays 0."""
    return torch.stack([grow(mask, -n) for n in range(cells + 1)]).mean(0)


def enlarge(mask, factor):
    """The mask [b, h, w] with `factor` x `factor` pixels for each cell."""
    return mask.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
