"""Edit-friendly DDPM noise space (Huberman-Spiegelglas et al. 2023, arXiv 2304.06140)."""

from dataclasses import dataclass, field

import torch

from ..shared.euler import ancestral, signal
from ..shared.picture import check_latent, check_sigmas
from ..shared.steering import blame, number
from ..shared.trajectory import Trajectory, fingerprint


def mean(sampling, x, D, s, s_next, eta):
    """a' D + k (x - a D) / s, the mean of a stochastic step from s to s_next; k: the noise that eta lets it keep."""
    a, a_next = signal(sampling, s), signal(sampling, s_next)
    kept, _ = ancestral(s, s_next, a_next, sampling, eta)
    return wide(a_next * D + kept * (x - a * D) / s)


def wide(x):
    """In double precision where the device has it: so a map added to its mean is the next latent to the last bit."""
    return x.double() if x.device.type in ("cpu", "cuda") else x


@dataclass
class Extraction:
    """A sampler of the host that finds the noise maps of a picture: at each noise level the picture is put under noise
    of its own, independent of the others, and a map is what leads from one level to the next,

        r_i = x_{i+1} - mean(x_i),

    the paper's sigma_i z_i. `path`: [N + 1] latents x_i, from noise to picture; `maps`: [N].
    """

    eta: float
    path: list = field(default_factory=list)
    maps: list = field(default_factory=list)
    node = "SteerEditFriendly"

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.k_diffusion.sampling import default_noise_sampler
        from comfy.utils import model_trange as trange

        x0, sampling = latent_image, model_wrap.inner_model.model_sampling
        draw, ones = default_noise_sampler(x0, seed=extra_args.get("seed")), x0.new_ones(x0.shape[0])
        path = [signal(sampling, s) * x0 + s * draw(s, s) for s in sigmas[:-1]] + [x0]
        for i in trange(len(sigmas) - 1, disable=disable_pbar):
            x, s, s_next = path[i], sigmas[i], sigmas[i + 1]
            D = model_wrap(x, s * ones, **extra_args)
            self.maps.append((path[i + 1] - mean(sampling, x, D, s, s_next, self.eta)).cpu())
            if callback is not None:
                callback(i, D, x, len(sigmas) - 1)
        self.path = [x.float().cpu() for x in path]
        return x0


@dataclass(frozen=True, eq=False)
class EditFriendly:
    """A sampler of the host that draws with the noise maps of a picture in the place of random noise. It starts at the
    picture's own noised latent, whatever noise it is given.

    maps: [N, B, C, ...], on the CPU.
    """

    trajectory: Trajectory
    maps: torch.Tensor
    eta: float

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.utils import model_trange as trange

        with blame(Extraction):
            self.trajectory.check(model_wrap.model_patcher, latent_image.shape, sigmas)
        steps, sampling = len(sigmas) - 1, model_wrap.inner_model.model_sampling
        path, maps = self.trajectory.latents[-len(sigmas) :], self.maps[-steps:]
        x, ones = path[0].to(latent_image), latent_image.new_ones(latent_image.shape[0])
        for i in trange(steps, disable=disable_pbar):
            s, s_next = sigmas[i], sigmas[i + 1]
            D = model_wrap(x, s * ones, **extra_args)
            m = mean(sampling, x, D, s, s_next, self.eta)
            x = (m + maps[i].to(m)).to(x)
            if denoise_mask is not None:
                x = torch.lerp(path[i + 1].to(x), x, denoise_mask)
            if callback is not None:
                callback(i, D, x, steps)
        return x


def invert(model, positive, negative, latent, sigmas, seed, cfg=3.5, eta=1.0, callback=None):
    """The `EditFriendly` sampler of `latent` [B, C, ...]. ValueError where there is none."""
    from comfy.samplers import CFGGuider

    with blame(Extraction):
        number("cfg", cfg)
        number("eta", eta, 0.0, 1.0)
        signal(model.get_model_object("model_sampling"), 0.5)
        check_latent(latent)
        check_sigmas(sigmas)
        if not positive:
            raise ValueError("needs a positive prompt: what the picture shows.")
    guider, found = CFGGuider(model), Extraction(eta)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    guider.sample(torch.zeros_like(latent), latent, found, sigmas, callback=callback, seed=seed)
    path = torch.stack(found.path)
    trajectory = Trajectory(sigmas.float().cpu(), path, fingerprint(model), positive, "edit-friendly")
    return EditFriendly(trajectory, torch.stack(found.maps), eta)
