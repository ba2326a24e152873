"""Deterministic inversion: DDIM (Song et al. 2020, arXiv 2010.02502, section 4.3) and its flow counterpart, the fixed
point of the implicit step (Garibi et al. 2024, arXiv 2403.14602), and the second-order step of RF-Solver (Wang et al.
2024, arXiv 2411.04746)."""

from dataclasses import dataclass, field

import torch

from ..shared.picture import check_latent, check_sigmas
from ..shared.steering import blame, number
from ..shared.trajectory import Trajectory, fingerprint

NODE = "SteerInvert"


def slope(predict, x, sigma):
    """dx/dsigma = (x - D(x, sigma)) / sigma, and D; the same for eps, v and flow models."""
    D = predict(x, sigma)
    return (x - D) / sigma, D


def euler(predict, x, s, t):
    """An Euler step from s up to t, which is DDIM's. At s = 0 no model has a slope; there the one at t is taken."""
    d, D = slope(predict, x, torch.where(s > 0, s, t))
    return x + (t - s) * d, D


def fixed_point(predict, x, s, t, iterations):
    """The y that an Euler step from t down to s takes to x: y = x + (t - s) d(y, t), iterated from the explicit one."""
    y, D = euler(predict, x, s, t)
    for _ in range(iterations):
        d, D = slope(predict, y, t)
        y = x + (t - s) * d
    return y, D


def midpoint(predict, x, s, t):
    """RF-Solver's second-order step, in the form of its code: the explicit midpoint rule, two evaluations."""
    y, _ = euler(predict, x, s, (s + t) / 2)
    d, D = slope(predict, y, (s + t) / 2)
    return x + (t - s) * d, D


METHODS = {"fixed-point": fixed_point, "ddim / euler": euler, "rf-solver": midpoint}


@dataclass
class Inversion:
    """A sampler of the host that walks the sigmas of a run backwards, from the picture to its noise.

    It starts at the clean latent itself and never scales noise, so it reaches sigma 1 of a flow, where the host's own
    way back divides by 0. `path` holds what it passed, [N + 1] latents from noise to picture.
    """

    method: str
    iterations: int
    path: list = field(default_factory=list)
    node = NODE

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.utils import model_trange as trange

        def predict(x, sigma):
            return model_wrap(x, sigma * ones, **extra_args)

        step = METHODS[self.method]
        options = {"iterations": self.iterations} if step is fixed_point else {}
        x, ones, up = latent_image, latent_image.new_ones(latent_image.shape[0]), sigmas.flip(0)
        path = [x]
        for i in trange(len(up) - 1, disable=disable_pbar):
            x, D = step(predict, x, up[i], up[i + 1], **options)
            path.append(x)
            if callback is not None:
                callback(i, D, x, len(up) - 1)
        self.path = [each.float().cpu() for each in reversed(path)]
        return x


def start_latent(trajectory, model):
    """The first latent of a trajectory as a LATENT of the host, from which a sampler without noise starts; where no
    such latent exists, at sigma 1 of a flow, the latent as it is."""
    x, sigma = trajectory.latents[0], trajectory.sigmas[0]
    scaled = model.get_model_object("model_sampling").inverse_noise_scaling(sigma, x)
    return model.model.process_latent_out(scaled if bool(scaled.isfinite().all()) else x)


class InvertedNoise:
    """The NOISE with which a sampler of the host starts at the first latent of a trajectory, whatever latent it is
    given beside it. For a sampler that runs all sigmas of the trajectory: from the last steps alone it would start at
    the wrong noise level."""

    seed = 0

    def __init__(self, trajectory, model):
        self.trajectory, self.model = trajectory, model

    def generate_noise(self, input_latent):
        latent, start = input_latent["samples"], self.trajectory.latents[0]
        if latent.shape != start.shape:
            raise ValueError(
                f"{NODE}: the inverted noise has shape {tuple(start.shape)}, the sampler's latent "
                f"{tuple(latent.shape)}; give the sampler the latent that was inverted."
            )
        sampling, sigma = self.model.get_model_object("model_sampling"), self.trajectory.sigmas[0]
        latent = latent.to(start)
        if torch.count_nonzero(latent):  # as the host does
            latent = self.model.model.process_latent_in(latent)
        highest = float(sampling.sigma_max)
        full = float(sigma) > highest * (1 - 1e-5)
        scale = sampling.noise_scaling(sigma, torch.ones_like(start), torch.zeros_like(start), full)
        return (start - sampling.noise_scaling(sigma, torch.zeros_like(start), latent, full)) / scale


def invert(model, positive, latent, sigmas, method="fixed-point", iterations=5, callback=None):
    """The `Trajectory` of `latent` [B, C, ...] under `positive`, without guidance. ValueError where it cannot be."""
    from comfy.samplers import CFGGuider

    with blame(Inversion):
        number("iterations", iterations, 1, 100)
        check_sigmas(sigmas)
        check_latent(latent)
    guider = CFGGuider(model)
    guider.set_conds(positive, [])
    sampler = Inversion(method, iterations)
    guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=callback, seed=0)
    if not all(bool(each.isfinite().all()) for each in sampler.path):
        raise ValueError(f"{NODE}: the inversion diverged; take more steps, or fewer iterations, or ddim / euler.")
    path = torch.stack(sampler.path)
    return Trajectory(sigmas.float().cpu(), path, fingerprint(model), positive, method)
