"""Where words of a prompt are in a picture: the attention it pays them, as Prompt-to-Prompt's local blend reads it
(Hertz et al. 2022, arXiv 2208.01626, section 3.2)."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import interpolate

from ..shared.architectures import flux, hunyuan, lumina, qwen, sd3, self_attention_layers, unet, wan
from ..shared.attention import Attention
from ..shared.mask import enlarge, grow
from ..shared.picture import check_latent
from ..shared.run import KEY
from ..shared.steering import RUN, STACK, Term, blame, number, steer
from ..shared.textattention import attention_to
from ..shared.words import encode

ALL = dict.fromkeys((a.name for a in (unet, flux, sd3, lumina, qwen, wan, hunyuan)), "0%-100%")
PLACES = 16  # of the latent's cells to a place of the layers that "auto" reads on a UNet: the paper's 16^2 of 64^2


class Maps:
    """Sums of word maps, by the grid of the layers that saw them."""

    def __init__(self):
        self.sums = {}  # (T, H, W) -> [sum [B, T * H * W], count]

    def add(self, grid, attention):
        at = self.sums.setdefault(grid, [0.0, 0])
        at[0], at[1] = at[0] + attention, at[1] + 1

    def mean(self, shape, one=True):
        """[B, H, W], averaged over heads, layers, evaluations and frames. one: of the layers alone whose grid is next
        to PLACES; otherwise of all, at the latent's size."""
        grids, cells = self.sums, shape[-2] * shape[-1]
        if one:
            grids = [min(grids, key=lambda g: abs(torch.tensor(g[1] * g[2] * PLACES / cells).log2().item()))]
        found, count = 0.0, 0
        for grid in grids:
            total, n = self.sums[grid]
            each = total.unflatten(1, grid).mean(1)
            found = found + (each if one else interpolate(each[:, None], shape[-2:], mode="bilinear")[:, 0])
            count += n
        return found / count


@dataclass(frozen=True)
class Look(Term):
    """Reads the attention to `columns` of the positive's text and changes nothing."""

    layers: str = "auto"
    words: str = ""
    columns: torch.Tensor = field(default=None, compare=False, repr=False)  # [1, columns of the prompt]
    node = "SteerWordMask"

    def attention(self, model):
        return (Attention("cross", self_attention_layers(model, self.layers, ALL), self.look, negative=False),)

    def look(self, target, beside, attend, call, weight, role):
        with blame(self):
            grid, seen = target.grid(), attention_to(target, self.columns)
        call.run.state.setdefault(self, Maps()).add(grid, seen)
        return attend(target)


class Levels:
    """A sampler of the host that takes no step: it shows the network the picture at each of some noise levels.

    latents: [levels, B, C, ...] of a trajectory; None for the clean latent under noise of its own at each.
    """

    def __init__(self, term, latents=None):
        self.term, self.latents, self.maps = term, latents, None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.k_diffusion.sampling import default_noise_sampler
        from comfy.utils import model_trange as trange

        sampling = model_wrap.inner_model.model_sampling
        fresh = default_noise_sampler(latent_image[:1], extra_args["seed"])
        for i in trange(len(sigmas) - 1, disable=disable_pbar):
            sigma = sigmas[i]
            if self.latents is None:
                x = sampling.noise_scaling(sigma, fresh(sigma, sigmas[i + 1]).expand_as(latent_image), latent_image)
            else:
                x = self.latents[i].to(latent_image)
            denoised = model_wrap(x, sigma.expand(len(x)), **extra_args)
            if callback is not None:
                callback(i, denoised, x, len(sigmas) - 1)
        self.maps = extra_args["model_options"]["transformer_options"][RUN].state[self.term]
        return latent_image


def look(model, clip, prompt, words, latent=None, trajectory=None, start=0.0, end=1.0, levels=5, layers="auto", seed=0,
         callback=None):
    """The attention to `words` of `prompt`, [B, H, W], of a picture: along its trajectory where the noise level lies in
    start..end, or, without one, of its latent [B, C, ...] under noise at so many levels there."""
    from comfy.samplers import CFGGuider

    conditioning, read = encode(clip, prompt)
    with blame(Look):
        found = list(read.find(words))
        if not found:
            raise ValueError(f'words is empty; name what to look for, of the prompt "{prompt.strip()}".')
        sigmas, latents = _levels(model, trajectory, start, end, levels)
    latent = latent if trajectory is None else trajectory.source
    columns = torch.zeros(1, read.columns)
    columns[0, found] = 1.0
    model = model.clone()
    for kind in model.wrappers:  # what the network sees, without guidance or edits
        model.remove_wrappers_with_key(kind, KEY)
    model.model_options.pop(STACK, None)
    term = Look(layers=layers, words=words, columns=columns)
    model = steer(model, term)
    guider, sampler = CFGGuider(model), Levels(term, latents)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    sigmas = torch.cat((sigmas, torch.zeros(1)))
    guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=callback, seed=seed)
    return sampler.maps.mean(latent.shape, layers.strip() == "auto").cpu(), latent.shape


def _levels(model, trajectory, start, end, levels):
    """(sigmas [levels], latents of the trajectory at each or None)."""
    sampling = model.get_model_object("model_sampling")
    if trajectory is None:
        shares = [start + (end - start) * (i + 0.5) / levels for i in range(levels)]
        sigmas = torch.tensor([float(sampling.percent_to_sigma(p)) for p in shares])
        return sigmas.clamp(max=float(sampling.sigma_max)), None
    trajectory.check(model)
    high, low = (float(sampling.percent_to_sigma(p)) for p in (start, end))
    chosen = [i for i, s in enumerate(trajectory.sigmas[:-1].tolist()) if low < s <= high]
    if not chosen:
        raise ValueError(
            f"none of the trajectory's {len(trajectory.sigmas) - 1} noise levels lies between start_percent {start:g} "
            f"and end_percent {end:g}; widen the window."
        )
    return trajectory.sigmas[chosen], trajectory.latents[chosen]


def mask(model, clip, prompt, words, latent=None, trajectory=None, start=0.2, end=0.8, levels=5, layers="auto",
         threshold=0.5, soft=0.0, cells=0, seed=0, callback=None):
    """(mask, map) [B, height, width] of the picture: 1 where the map is above `threshold`, and the map, 0 to 1.

    soft: width of a ramp around the threshold, as a share of the map's range.  cells: of the latent by which the mask
    grows.  ValueError where there is no such word, or nothing to look at.
    """
    with blame(Look):
        number("threshold", threshold, 0.0, 1.0)
        number("soft", soft, 0.0, 1.0)
        number("levels", levels, 1)
        if not start < end:
            raise ValueError(f"the window is empty: start_percent {start:g} must be below end_percent {end:g}.")
        if (latent is None) == (trajectory is None):
            raise ValueError("wire a trajectory or a latent: the picture to look at, and one of the two.")
        if latent is not None:
            check_latent(latent)
    found, shape = look(model, clip, prompt, words, latent, trajectory, start, end, levels, layers, seed, callback)
    found = interpolate(found[:, None], shape[-2:], mode="bilinear")[:, 0]
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    found = (found - low) / (high - low).clamp(min=1e-12)
    chosen = (found > threshold).float() if soft == 0 else ((found - threshold) / soft + 0.5).clamp(0, 1)
    factor = model.get_model_object("latent_format").spacial_downscale_ratio
    return enlarge(grow(chosen[:, None], cells)[:, 0], factor), enlarge(found, factor)
