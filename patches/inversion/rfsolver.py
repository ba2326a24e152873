"""The second-order sampler of RF-Solver (Wang et al. 2024, arXiv 2411.04746)."""

import torch

from .invert import midpoint


def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x' = x + (s' - s) v + (s' - s)^2 / 2 v', with v' the slope of v over half the step: the explicit midpoint rule,
    which SteerInvert takes upwards. Two evaluations per step."""
    from comfy.utils import model_trange as trange

    ones = x.new_ones(x.shape[0])

    def predict(x, sigma):
        return model(x, sigma * ones, **extra_args)

    with torch.no_grad():
        for i in trange(len(sigmas) - 1, disable=disable):
            x, D = midpoint(predict, x, sigmas[i], sigmas[i + 1])
            if callback is not None:
                clean = x if sigmas[i + 1] == 0 else D
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": clean})
    return x


def sampler():
    """A SAMPLER of the host."""
    from comfy.samplers import KSAMPLER

    return KSAMPLER(sample)
