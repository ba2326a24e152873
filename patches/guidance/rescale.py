"""Guidance rescale (Lin et al. 2023, arXiv 2305.08891, section 3.4)."""

from dataclasses import dataclass

from ..shared.steering import Term, number, steer


@dataclass(frozen=True)
class Rescale(Term):
    """v' = v (phi std(v_c) / std(v) + 1 - phi), v the guided output of the network, v_c that of the positive.

    Of a network that predicts a velocity, on VP diffusion (as which the host's eps models count too) or on flow. All
    of these outputs are multiples of k x - D (see `share`), which is what is rescaled; std over all non-batch
    dimensions.

    phi: share of the rescaled.
    """

    phi: float = 0.7
    node = "SteerRescale"
    exclusive = True

    def check(self):
        number("amount", self.phi, high=1.0)

    @property
    def off(self):
        return super().off or self.phi == 0.0

    def prepare(self, run):
        share(run.sampling, 1.0)

    def transform(self, denoised, call, weight):
        sigma = call.sigma.view(-1, *[1] * (denoised.ndim - 1))
        kx = call.x * share(call.run.sampling, sigma)
        v, v_c = kx - denoised, kx - call.predictions["positive"]
        return kx - v.lerp(v * (std(v_c) / std(v)), self.phi * weight)


def share(model_sampling, sigma):
    """k(sigma) of D = k x - c v: how much of D a network that predicts v = 0 would take from x."""
    import comfy.model_sampling as ms

    if isinstance(model_sampling, (ms.X0, ms.IMG_TO_IMG_FLOW)):
        return 0.0  # predicts D itself
    if isinstance(model_sampling, ms.CONST):
        return 1.0
    if isinstance(model_sampling, ms.COSMOS_RFLOW):
        return 1 / (1 + sigma)
    if isinstance(model_sampling, getattr(ms, "V_PREDICTION_DDPM", ())):  # not in every version of the host
        return (sigma**2 + 1) ** -0.5
    if isinstance(model_sampling, ms.EPS):
        data = model_sampling.sigma_data**2
        return data / (sigma**2 + data)
    kind = ", ".join(base.__name__ for base in type(model_sampling).__bases__)
    raise ValueError(f"the output of this model ({kind}) is not known; use it on eps, v, EDM and flow models.")


def std(v):
    """Standard deviation over all non-batch dimensions, [B, 1, ...]; never 0."""
    return v.std(tuple(range(1, v.ndim)), keepdim=True).clamp(min=1e-12)


def apply(model, amount, schedule):
    return steer(model, Rescale(schedule, amount))
