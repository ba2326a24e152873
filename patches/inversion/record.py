"""The trajectory of a picture while it is generated: what editing nodes need of a source that was never inverted."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..shared.guider import Guider
from ..shared.picture import check_sigmas
from ..shared.steering import blame
from ..shared.trajectory import Trajectory, fingerprint

NEAR = 1e-3  # relative, of a sigma


@dataclass
class Recorder:
    """A sampler of the host that does what another does, and keeps the latent that the model is shown at each sigma.

    sigmas: [N + 1].  found: {step: [B, C, ...]}, the last of them what the sampler returns.
    """

    sampler: Any
    sigmas: torch.Tensor
    found: dict = field(default_factory=dict)
    node = "SteerRecordTrajectory"

    def __getattr__(self, name):
        return getattr(self.__dict__["sampler"], name)

    def sample(self, model_wrap, sigmas, *args, **kwargs):
        levels = self.sigmas[:-1]

        def watch(x, sigma, **options):
            level = float(sigma.max())
            step = int((levels - level).abs().argmin())
            # samplers of higher order also look between; SDE ones begin a little below sigma 1 of a flow
            if abs(float(levels[step]) - level) <= NEAR * level:
                self.found.setdefault(step, x.float().cpu().clone())
            return model_wrap(x, sigma, **options)

        samples = self.sampler.sample(Guider(model_wrap, watch), sigmas, *args, **kwargs)
        self.found[len(levels)] = samples.float().cpu()
        return samples

    def trajectory(self, guider):
        """The `Trajectory` of the run that was sampled."""
        sigmas = self.sigmas
        missed = [n for n in range(len(sigmas)) if n not in self.found]
        if missed:
            raise ValueError(
                f"{self.node}: the sampler does not ask the model at sigma {float(sigmas[missed[0]]):.4g} of its "
                "schedule, so its path is not known there; use euler, dpmpp_2m or another sampler of fixed steps."
            )
        path, positive = [self.found[n] for n in range(len(sigmas))], conditioning(guider.original_conds["positive"])
        return Trajectory(sigmas, torch.stack(path), fingerprint(guider.model_patcher), positive, "recorded")


def conditioning(conds):
    """The CONDITIONING of which the host made these conds."""
    own = ("cross_attn", "model_conds", "uuid")
    return [[cond.get("cross_attn"), {k: v for k, v in cond.items() if k not in own}] for cond in conds]


def recorder(guider, sampler, sigmas):
    """The `Recorder` of a run; ValueError where there can be no trajectory of it."""
    with blame(Recorder):
        check_sigmas(sigmas)
        if "positive" not in guider.original_conds:
            raise ValueError(
                f"{type(guider).__name__} has no positive conditioning for the trajectory to keep; use CFGGuider."
            )
    return Recorder(sampler, sigmas.float().cpu().clone())  # uni_pc writes into a run's sigmas
