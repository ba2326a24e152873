"""RF-inversion (Rout et al. 2024, arXiv 2410.10792): a rectified flow under optimal control, towards ordinary noise on
the way up and towards the picture on the way down."""

from dataclasses import dataclass, field

import torch

from ..shared.picture import check_latent, check_sigmas
from ..shared.steering import Term, blame, number, steer
from ..shared.trajectory import Trajectory, fingerprint


@dataclass
class Forward:
    """A sampler of the host that walks the sigmas of a run backwards, from the picture to its noise:

        dx = [v + gamma (v_n - v)] ds,   v = (x - D) / s,   v_n = (n - x) / (1 - s)

    with v_n the field that leads to the noise n. gamma 0 is Euler inversion, gamma 1 the straight line to n. `path`
    holds what it passed, [N + 1] latents from noise to picture.
    """

    gamma: float = 0.5
    path: list = field(default_factory=list)
    node = "SteerRFInversion"

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        from comfy.utils import model_trange as trange

        x, ones, up = latent_image, latent_image.new_ones(latent_image.shape[0]), sigmas.flip(0)
        path = [x]
        for i in trange(len(up) - 1, disable=disable_pbar):
            s, t = up[i], up[i + 1]
            at = s.where(s > 0, t)  # at 0 no model has a slope
            D = model_wrap(x, at * ones, **extra_args)
            v = (x - D) / at
            x = x + (t - s) * (v + self.gamma * ((noise - x) / (1 - s) - v))
            path.append(x)
            if callback is not None:
                callback(i, D, x, len(up) - 1)
        self.path = [each.float().cpu() for each in reversed(path)]
        return x


@dataclass(frozen=True)
class Controller(Term):
    """D + eta (x0 - D): the paper's v + eta ((x - x0) / s - v), a pull towards the picture x0."""

    trajectory: Trajectory = None
    eta: float = 1.0
    node = "SteerRFController"
    exclusive = True

    def check(self):
        number("eta", self.eta, 0.0, 1.0)

    @property
    def off(self):
        return super().off or self.eta == 0.0

    def prepare(self, run):
        self.trajectory.check(run.model, run.shape)

    def step(self, denoised, call, weight):
        return torch.lerp(denoised, self.trajectory.source.to(denoised), self.eta * weight)


def only_flow(model):
    """Raises ValueError for a ModelPatcher that is no rectified flow."""
    from comfy.model_sampling import CONST

    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, CONST):
        kind = ", ".join(base.__name__ for base in type(sampling).__bases__)
        raise ValueError(
            f"is for flow models (Flux, SD3, ...), whose last noise level is pure noise; this model is {kind}. Use "
            "SteerInvert, SteerEditFriendly or SteerFlowEdit with it."
        )


def invert(model, positive, latent, sigmas, noise, gamma=0.5, callback=None):
    """The `Trajectory` of `latent` [B, C, ...] towards `noise` of the same shape. ValueError where it cannot be."""
    from comfy.samplers import CFGGuider

    with blame(Forward):
        number("gamma", gamma, 0.0, 1.0)
        only_flow(model)
        check_latent(latent)
        check_sigmas(sigmas)
        if not positive:
            raise ValueError("needs a positive conditioning; the paper's is an empty prompt.")
        if gamma and not torch.count_nonzero(noise):
            raise ValueError("the noise is empty, there is nothing to go to; wire RandomNoise, or set gamma to 0.")
    guider, sampler = CFGGuider(model), Forward(gamma)
    guider.set_conds(positive, [])
    guider.sample(noise, latent, sampler, sigmas, callback=callback, seed=0)
    return Trajectory(sigmas.float().cpu(), torch.stack(sampler.path), fingerprint(model), positive, "rf-inversion")


def apply(model, trajectory, eta, schedule):
    with blame(Controller):
        only_flow(model)
        trajectory.check(model)
    return steer(model, Controller(schedule, trajectory, eta))
