"""The mask of DiffEdit (Couairon et al. 2022, arXiv 2210.11427, section 3.2): where two prompts want other pictures."""

import torch

from ..guidance.sag import blur
from ..shared.mask import enlarge, grow
from ..shared.picture import check_latent
from ..shared.run import KEY
from ..shared.steering import number

NODE = "SteerDiffEditMask"
EXTREME = 3.0  # times the mean of a map, above which a difference is an outlier (the authors' value)


class Differences:
    """A sampler of the host that takes no step: it noises the latent `maps` times and asks for both predictions.

    `mean` holds |eps_target - eps_source|, averaged over noises and channels, [B, H, W], up to a factor: it is the
    difference of the D, divided by sigma. Every item of a batch gets the same noises.
    """

    def __init__(self, maps):
        self.maps, self.mean = maps, None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.k_diffusion.sampling import default_noise_sampler
        from comfy.samplers import calc_cond_batch
        from comfy.utils import model_trange as trange

        network, sigma = model_wrap.inner_model, sigmas[0]
        conds = [model_wrap.conds["positive"], model_wrap.conds["negative"]]
        fresh, each = default_noise_sampler(latent_image[:1], extra_args["seed"]), sigma.expand(len(latent_image))
        total = 0
        for i in trange(self.maps, disable=disable_pbar):
            n = fresh(sigma, sigmas[1]).expand_as(latent_image)
            x = network.model_sampling.noise_scaling(sigma, n, latent_image)
            target, source = calc_cond_batch(network, conds, x, each, extra_args["model_options"])
            total = total + (target - source).abs().flatten(1, -3).mean(1)
            if callback is not None:
                callback(i, target, x, self.maps)
        self.mean = (total / self.maps).float().cpu()
        return latent_image


def normalised(difference):
    """[B, H, W] without outliers, each item from 0 to 1."""
    top = EXTREME * difference.mean((-2, -1), keepdim=True)
    clamped = difference.minimum(top)
    return clamped / clamped.amax((-2, -1), keepdim=True)


def mask(model, source, target, latent, seed=0, maps=10, strength=0.5, threshold=0.5, soft=0.0, cells=0,
         callback=None):
    """(mask, map) [B, height, width] of the picture: 1 where the map is above `threshold`, and the map, 0 to 1.

    source, target: CONDITIONING.  latent: [B, C, ...].  strength: share of the noise levels up to which the picture is
    noised.  soft: sigma of a blur of the map, in cells of the latent.  cells: by which the mask then grows.
    ValueError where there is nothing to compare.
    """
    from comfy.samplers import CFGGuider

    try:
        number("maps", maps, 1)
        number("strength", strength, 0.0, 1.0)
        number("threshold", threshold, 0.0, 1.0)
        number("blur", soft)
        _check(latent, source, target, strength)
    except ValueError as error:
        raise ValueError(f"{NODE}: {error}") from None
    model = model.clone()
    for kind in model.wrappers:  # what the network says, without guidance or edits
        model.remove_wrappers_with_key(kind, KEY)
    sampling = model.get_model_object("model_sampling")
    sigma = min(float(sampling.percent_to_sigma(1 - strength)), float(sampling.sigma_max))
    guider, sampler = CFGGuider(model), Differences(maps)
    guider.set_conds(target, source)
    guider.sample(torch.zeros_like(latent), latent, sampler, torch.tensor([sigma, 0.0]), callback=callback, seed=seed)
    found = sampler.mean if soft == 0.0 else blur(sampler.mean, soft)
    if not bool((found.amax((-2, -1)) > 0).all()):
        raise ValueError(f"{NODE}: both prompts want the same picture; let target name what should become different.")
    found = normalised(found)
    chosen = grow((found > threshold).float()[:, None], cells)[:, 0]
    factor = model.get_model_object("latent_format").spacial_downscale_ratio
    return enlarge(chosen, factor), enlarge(found, factor)


def _check(latent, source, target, strength):
    check_latent(latent)
    if latent.ndim < 4:
        raise ValueError(f"needs the latent of a picture or a video; this one has {latent.ndim} dimensions.")
    for name, conditioning in (("source", source), ("target", target)):
        if not conditioning:
            raise ValueError(f"the {name} prompt is missing; wire a CLIP Text Encode to {name}.")
    if strength == 0.0:
        raise ValueError("strength 0 leaves no noise under which the prompts could differ; use 0.5.")
