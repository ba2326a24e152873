"""Directions in the h-space of a UNet, found without training: what the features of two kinds of pictures differ in,
and along which those of a batch vary most (Haas et al. 2023, arXiv 2303.11073)."""

from dataclasses import dataclass, field

import torch

from ..shared.hspace import block, probe
from ..shared.layers import Layer
from ..shared.steering import blame, number
from ..shared.trajectory import Fingerprint, fingerprint

NODE = "SteerHSpaceDirection"


@dataclass(frozen=True, eq=False)
class Direction:
    """A change of features at each noise level.

    sigmas: [T], falling.  dh: [T, C, H, W], float32, on the CPU.  shape: [C, H, W] of the latents it was found on.
    """

    sigmas: torch.Tensor
    dh: torch.Tensor = field(repr=False)
    layer: Layer
    shape: tuple
    model: Fingerprint
    node = NODE

    def at(self, sigma):
        """dh [C, H, W] at `sigma`; straight between two levels, the nearest beyond the ends."""
        sigmas = self.sigmas
        i = int((sigmas > sigma * (1 + 1e-5)).sum())
        if i in (0, len(sigmas)):
            return self.dh[min(i, len(sigmas) - 1)]
        high, low = float(sigmas[i - 1]), float(sigmas[i])
        return torch.lerp(self.dh[i], self.dh[i - 1], (sigma - low) / (high - low))


def of_prompts(model, positive, negative, noise, latent, sigmas, cfg, layer="middle", callback=None):
    """What features of pictures drawn with `positive` have more than those drawn with `negative`, from the same noise.

    noise: a NOISE of the host.  latent: LATENT, whose batch is the number of pictures of each.
    """
    with blame(Direction):
        where = block(model, layer)
        number("cfg", cfg)
    _steps(sigmas)
    means = []
    for conditioning, other in ((positive, negative), (negative, positive)):
        path = _draw(model, conditioning, other, noise, latent, sigmas, cfg, callback)
        means.append(_mean(probe(model, conditioning, path, where)))
    return _direction(model, means[0] - means[1], sigmas, where, latent)


def of_pictures(model, conditioning, noise, latent, other, sigmas, layer="middle", component=1):
    """What features of the pictures in `latent` have more than those of `other`, at equal noise; without `other`, their
    principal direction number `component`, as long as one standard deviation."""
    with blame(Direction):
        where = block(model, layer)
    _steps(sigmas)
    sampling, eps = model.get_model_object("model_sampling"), noise.generate_noise(latent)

    def features(samples):
        if samples.shape[1:] != eps.shape[1:]:
            raise ValueError(
                f"{NODE}: the pictures differ in size: {tuple(samples.shape[1:])} and {tuple(eps.shape[1:])} "
                "(channels, height, width); resize one kind."
            )
        clean = model.model.process_latent_in(samples)
        n = eps[torch.arange(len(clean)) % len(eps)].to(clean)
        return probe(model, conditioning, [(sampling.noise_scaling(s, n, clean), s) for s in sigmas[:-1]], where)

    found = features(latent["samples"])
    if other is not None:
        dh = _mean(found) - _mean(features(other["samples"]))
    else:
        dh = principal(torch.stack([h for h, _ in found], 1), component)
    return _direction(model, dh, sigmas, where, latent)


def principal(h, component):
    """Principal direction of features h [B, T, ...], number `component` from 1, times its standard deviation.

    One direction for all T together. Its sign is open: the first item that is not in the middle lies on its side.
    """
    most = len(h) - 1
    if not 1 <= component <= most:
        raise ValueError(
            f"{NODE}: there is no principal direction {component} of {len(h)} pictures; they have {max(most, 0)}. Give "
            "more pictures or a lower component."
        )
    centred = h - h.mean(0)
    flat = centred.flatten(1)
    values, vectors = torch.linalg.eigh((flat @ flat.T).double())
    vector = vectors[:, -component]  # the B shares of the pictures, in place of a basis of the features
    vector = vector * vector[vector.abs() > 1e-6][0].sign()
    # flat = sum of s u v^T: u^T flat = s v, and the deviation along v is s / sqrt(B - 1)
    return torch.tensordot(vector.float(), centred, 1) / most**0.5


def _draw(model, positive, negative, noise, latent, sigmas, cfg, callback):
    """[(x, sigma)] of an Euler run."""
    from comfy.samplers import CFGGuider, sampler_object

    guider, path = CFGGuider(model), []
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)

    def keep(i, D, x, total):
        path.append((x.cpu().clone(), sigmas[i]))
        if callback is not None:
            callback(i, D, x, total)

    eps, seed = noise.generate_noise(latent), noise.seed
    guider.sample(eps, latent["samples"], sampler_object("euler"), sigmas, callback=keep, seed=seed, disable_pbar=True)
    return path


def _mean(found):
    return torch.stack([h.mean(0) for h, _ in found])


def _steps(sigmas):
    if len(sigmas) < 2 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(f"{NODE}: the sigmas must fall, over one step at least; choose another scheduler.")


def _direction(model, dh, sigmas, layer, latent):
    if not bool(dh.isfinite().all()) or not bool(dh.any()):
        raise ValueError(f"{NODE}: both kinds of pictures have the same features; give other prompts or pictures.")
    return Direction(sigmas[:-1].float().cpu(), dh, layer, tuple(latent["samples"].shape[1:]), fingerprint(model))
