"""From latents to pictures with a graph, for losses of what the decoded estimate shows.

The host's `VAE.decode` writes in place and keeps no graph, so its network is called here, inside `gradients`.
"""

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .gradient import differentiable, gradients, own

TILE, MARGIN = 64, 16  # cells of the latent: what a tile shows, and what it sees beside that on every side


@dataclass(frozen=True)
class Decoder:
    """A VAE of the host, or a TAESD that was loaded as one, that makes pictures."""

    vae: Any = field(repr=False)
    patcher: Any = field(repr=False)

    @property
    def factor(self):
        """Pixels of a side of a cell."""
        return int(self.vae.upscale_ratio)

    def __call__(self, latents):
        """Pictures [n, 3, H, W] in 0..1, float32, of latents [n, C, h, w] as the host stores them; all at once, with
        their graph where `gradients(self.patcher)` is open. The weights must be loaded."""
        z = latents.to(self.patcher.load_device, self.vae.vae_dtype)
        return self.vae.process_output(self.patcher.model.decode(z).float().clone()).to(latents.device)[:, :3]

    def slope(self, latents, loss, tile=TILE, margin=MARGIN):
        """(losses [n], their slope by the latents) for loss(pictures [n, 3, H, W]) -> [n].

        A latent larger than a tile with its margins is decoded in tiles, without a graph, and the slope by the picture
        is taken back through one tile at a time: the memory is that of one tile. Then the whole is what its tiles are.
        """
        parts = list(tiles(latents.shape[-2:], tile, margin))
        with gradients(self.patcher):
            latents = own(latents)
            if len(parts) == 1:
                whole = latents.requires_grad_()
                pictures = self(whole)
                losses = loss(pictures)
                (back,) = torch.autograd.grad(losses.sum(), pictures, retain_graph=True)
                return losses.detach(), vjp(pictures, whole, back)
            with torch.no_grad():
                pictures = self._tiled(latents, parts)
            losses = loss(pictures.requires_grad_())
            (back,) = torch.autograd.grad(losses.sum(), pictures)
            slope, n = torch.zeros_like(latents), self.factor
            for seen, shown, inside in parts:
                part = own(latents[(..., *seen)]).requires_grad_()
                slope[(..., *seen)] += vjp(self(part)[(..., *scaled(inside, n))], part, back[(..., *scaled(shown, n))])
        return losses.detach(), slope

    def picture(self, latents):
        """Pictures without a graph, in tiles where `slope` takes them."""
        with gradients(self.patcher), torch.no_grad():
            return self._tiled(own(latents), list(tiles(latents.shape[-2:], TILE, MARGIN)))

    def encode(self, pictures):
        """Latents as the host stores them, without a graph, of pictures that `picture` made."""
        x = self.vae.process_input(pictures.to(self.patcher.load_device)).to(self.vae.vae_dtype)
        return self.patcher.model.encode(x).float().to(pictures.device)

    def _tiled(self, latents, parts):
        if len(parts) == 1:
            return self(latents)
        n = self.factor
        out = latents.new_empty(len(latents), 3, *(n * size for size in latents.shape[-2:]), dtype=torch.float32)
        for seen, shown, inside in parts:
            out[(..., *scaled(shown, n))] = self(latents[(..., *seen)])[(..., *scaled(inside, n))]
        return out


def vjp(out, at, back):
    """`back` by `out`, taken back to `at`; each item at unit size on its way, which half precision can hold."""
    size = back.flatten(1).abs().amax(1).clamp(min=1e-30)
    shape = [-1] + [1] * (back.ndim - 1)
    (slope,) = torch.autograd.grad(out, at, (back / size.view(shape)).to(out), retain_graph=True)
    return slope * size.view(shape).to(slope)


def tiles(size, tile, margin):
    """(rows and columns that a tile sees, that it shows, and where these lie in it), for a grid of `size`."""
    if max(size) <= tile + 2 * margin:
        whole = tuple(slice(0, n) for n in size)
        yield whole, whole, whole
        return
    for top in range(0, size[0], tile):
        for left in range(0, size[1], tile):
            shown = [slice(at, min(at + tile, n)) for at, n in zip((top, left), size, strict=True)]
            seen = [slice(max(s.start - margin, 0), min(s.stop + margin, n)) for s, n in zip(shown, size, strict=True)]
            inside = [slice(s.start - o.start, s.stop - o.start) for s, o in zip(shown, seen, strict=True)]
            yield tuple(seen), tuple(shown), tuple(inside)


def scaled(slices, n):
    return tuple(slice(s.start * n, s.stop * n) for s in slices)


def stored(model, D):
    """D as the model works on it, as the host stores latents; differentiable. model: a BaseModel."""
    return _format(model).process_out(D)


def worked(model, latents):
    """Latents as the host stores them, as the model works on them; differentiable."""
    return _format(model).process_in(latents)


def _format(model):
    latent_format = copy(model.latent_format)
    vars(latent_format).update(own(vars(latent_format)))  # its constants were made in inference mode
    return latent_format


def fitted(pictures, like):
    """Pictures [b, 3, h, w] in the size and on the device of others, one for each or one for all."""
    pictures = own(pictures).to(like.device)
    if pictures.shape[-2:] != like.shape[-2:]:
        pictures = F.interpolate(pictures, like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    return pictures.expand(len(like), -1, -1, -1)


def decoder(vae):
    """A `Decoder` of a VAE of the host; ValueError where it makes no pictures, or cannot be differentiated."""
    if getattr(vae, "latent_dim", 2) != 2:
        raise ValueError("looks at pictures, and this VAE makes video or sound.")
    return Decoder(vae, differentiable(vae.patcher))


def fits(decoder, run):
    """Raises ValueError unless the run makes latents of this VAE."""
    if len(run.shape) != 4:
        raise ValueError(f"looks at pictures, and this latent has {len(run.shape)} dimensions.")
    channels = getattr(decoder.vae, "latent_channels", run.shape[1])
    if channels != run.shape[1]:
        raise ValueError(f"the VAE is of another model: {channels} channels, the latent has {run.shape[1]}.")
