"""Blended Latent Diffusion (Avrahami et al. 2022, arXiv 2206.02779) against a trajectory: outside a mask the latent is
put back on the path of the source at every step."""

from dataclasses import dataclass, field

import torch

from ..shared.guider import Guider
from ..shared.mask import feather, fit, grow
from ..shared.schedule import Schedule
from ..shared.steering import blame
from ..shared.trajectory import Trajectory

KEY = "steer.keepregion"


@dataclass(frozen=True, eq=False)
class Region:
    """m: where the picture may change, 1 inside and 0 outside.

    The network sees m x + (1 - m) z, with z the source at this noise level: on its trajectory, or, without one, its
    latent under the noise of this run (the paper's way, as the host does it). The sampler gets m D + (1 - m) z_0. So
    any sampler ends at z_0 outside, up to rounding; the latent that comes out is that of the source itself.
    """

    mask: torch.Tensor = field(repr=False)  # [b, h, w], 1 may change
    trajectory: Trajectory | None
    grow: int = 0  # cells of the latent
    feather: int = 0
    schedule: Schedule = Schedule()
    node = "SteerKeepRegion"

    def on(self, shape):
        """m on a latent [B, C, ...]; ValueError where it makes no sense."""
        empty = "the mask is empty, so that nothing may change; paint what may change."
        if not bool(self.mask.any()):  # of whatever size: so the host loads pictures without transparency
            raise ValueError(empty)
        m = feather(grow(fit(self.mask, shape), self.grow), self.feather)
        if not bool(m.any()):
            raise ValueError(empty)
        if bool((m == 1).all()):
            raise ValueError(
                "the mask is full, so that nothing is kept; invert it if it marks what to keep, or leave the node out."
            )
        return m

    def check(self, model, latent, shape, sigmas):
        if self.trajectory is None:
            if not torch.count_nonzero(latent):
                raise ValueError(
                    "the sampler's latent is empty, there is nothing to keep; wire the picture's latent to the "
                    "sampler, or a trajectory to this node."
                )
            return
        one = len(self.trajectory.source) == 1  # goes with all items
        self.trajectory.check(model, (1, *shape[1:]) if one else shape)
        highest = float(self.trajectory.sigmas[0])
        if float(sigmas[0]) > highest * (1 + 1e-4):
            raise ValueError(
                f"the sampler starts at sigma {float(sigmas[0]):.4g}, above the trajectory, which was inverted up to "
                f"{highest:.4g}; wire the sigmas of SteerInvert to the sampler, or invert with a higher denoise."
            )

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        model = executor.class_obj.model_patcher
        with blame(self):
            self.check(model, latent_image, noise.shape, sigmas)
            m = self.on(noise.shape)
        ends = float(sigmas[-1]) == 0.0 and self.schedule.end_percent == 1.0  # uni_pc writes into the sigmas
        output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if not ends:
            return output
        return torch.where(m.to(output) > 0, output, self.source(model.model, latent_image).to(output))

    def source(self, model, latent_image):
        """The clean latent as it goes in and out of the sampler: bit for bit what was inverted, if it is given."""
        if self.trajectory is None:
            return latent_image
        source = self.trajectory.source
        given = latent_image.to(source)
        given = model.process_latent_in(given) if torch.count_nonzero(given) else given  # as the host does
        return latent_image if torch.allclose(given, source, atol=1e-5) else model.process_latent_out(source)

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs):
        window = self.schedule.resolve(guider.model_patcher.get_model_object("model_sampling"))
        m = self.on(noise.shape).to(noise)
        z_0 = latent_image if self.trajectory is None else self.trajectory.source.to(noise)

        def predict(x, sigma, **options):
            level = float(sigma.max())
            if not window.weight(level):
                return guider(x, sigma, **options)
            if self.trajectory is None:
                z = guider.inner_model.scale_latent_inpaint(x=x, sigma=sigma, noise=noise, latent_image=z_0)
            else:
                z = self.trajectory.at(level).to(x)
            D = guider(m * x + (1 - m) * z, sigma, **options)
            return m * D + (1 - m) * z_0

        return executor(Guider(guider, predict), sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)


def apply(model, mask, trajectory, cells, soft, schedule):
    """A clone of `model` that changes the picture inside of `mask` alone."""
    return carry(model, Region(mask, trajectory, cells, soft, schedule))


def carry(model, region):
    """A clone of `model` that keeps what is outside of `region`."""
    from comfy.patcher_extension import WrappersMP

    with blame(region):
        if region.feather < 0:
            raise ValueError(f"feather {region.feather} must be 0 or more.")
        if region.trajectory is not None:
            region.trajectory.check(model)
            region.on(region.trajectory.source.shape)
    model = model.clone()
    if not region.schedule.closed:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, region.outer_sample)
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, region.sampler_sample)
    return model
