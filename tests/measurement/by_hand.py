"""What tests of energies share: small models, D at one noise level, and the two numbers of that level."""

from functools import cache

import comfy.samplers
import torch
import toy
from steer.patches.shared.euler import signal

SMALL = dict(height=8, width=8)


@cache
def made(kind):
    return {"unet": toy.model, "flux": toy.flux, "gaussian": toy.gaussian}[kind]()


def once(model, level=0.5, **options):
    """D at one sigma, as the model has it: one step to 0, from exactly that sigma."""
    sigma = model.get_model_object("model_sampling").percent_to_sigma(level)
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    given = dict(start=toy.noise(**SMALL), sigmas=torch.tensor([sigma, 0.0]), sampler=sampler)
    return model.model.process_latent_in(toy.sample(model, **{**given, **options}))


def scales(model, level=0.5):
    sampling = model.get_model_object("model_sampling")
    s = float(sampling.percent_to_sigma(level))
    return s, float(signal(sampling, s))
