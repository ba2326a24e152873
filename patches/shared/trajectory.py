"""A trajectory: the latents of a sampling run from noise to picture, written by inversion and read by editors."""

from dataclasses import dataclass, field

import torch

WEIGHTS = 64  # numbers of the network that tell one set of weights from another
TOLERANCE = 0.02  # relative, for the same weights in another precision


@dataclass(frozen=True)
class Fingerprint:
    """What tells models apart: class of network, latent format, kind of prediction, and a few of the weights.

    Patches on weights (a LoRA) do not count: a picture may well be edited with another LoRA than it was inverted with.
    """

    network: str
    latent: str
    prediction: str
    weights: torch.Tensor = field(compare=False, repr=False)  # [<= WEIGHTS], float32

    def difference(self, other):
        """What of `other` is not the same, as text; None where nothing is."""
        for name in ("network", "latent", "prediction"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                return f"{name} {mine}, the model's is {its}"
        mine, its = self.weights, other.weights
        if mine.shape != its.shape or not torch.allclose(mine, its, rtol=TOLERANCE, atol=1e-4):
            return "other weights of the same network (another checkpoint)"
        return None


def fingerprint(model):
    """The `Fingerprint` of a ModelPatcher."""
    network, sampling = model.model.diffusion_model, model.get_model_object("model_sampling")
    vectors = [p for _, p in sorted(network.named_parameters(), key=lambda item: item[0]) if p.ndim == 1 and p.numel()]
    chosen = vectors[:: max(1, len(vectors) // WEIGHTS)][:WEIGHTS]  # biases and norms: what is not quantised
    first = [p.detach()[:1].float().cpu() for p in chosen]
    return Fingerprint(
        type(network).__name__,
        type(model.model.latent_format).__name__,
        ", ".join(base.__name__ for base in type(sampling).__bases__),
        torch.cat(first).clone() if first else torch.zeros(0),
    )


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Where a picture was at each noise level.

    sigmas: [N + 1], float32, falling.
    latents: [N + 1, B, C, ...], float32, on the CPU, as a sampler sees them: after the host's `process_latent_in`, with
        the noise of their sigma.
    conditioning: CONDITIONING under which they were found.
    method: how, for people.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    model: Fingerprint
    conditioning: list = field(repr=False)
    method: str = ""

    def __post_init__(self):
        if self.sigmas.ndim != 1 or len(self.sigmas) < 2 or len(self.sigmas) != len(self.latents):
            raise ValueError(
                f"the trajectory has {len(self.latents)} latents for {len(self.sigmas)} sigmas; it needs as many, and "
                "two or more."
            )
        if not bool((self.sigmas[1:] < self.sigmas[:-1]).all()):
            raise ValueError("the sigmas of the trajectory must fall with every step.")

    @property
    def source(self):
        """The clean latent, [B, C, ...]."""
        return self.latents[-1]

    def at(self, sigma):
        """The latent [B, C, ...] at `sigma`; between two steps on the straight line that an Euler step takes."""
        sigmas = self.sigmas
        i = int((sigmas > sigma * (1 + 1e-5)).sum())  # the first that is not above it
        i = min(max(i, 0), len(sigmas) - 1)
        if i == 0 or abs(float(sigmas[i]) - sigma) <= 1e-5 * max(sigma, 1e-3):
            return self.latents[i]
        high, low = float(sigmas[i - 1]), float(sigmas[i])
        return torch.lerp(self.latents[i], self.latents[i - 1], (sigma - low) / (high - low))

    def check(self, model, shape=None, sigmas=None):
        """Raises ValueError, saying what differs, where it is not a trajectory of this ModelPatcher, of latents of this
        shape [B, C, ...], over these sigmas (a part of its own, ending where it ends)."""
        difference = self.model.difference(fingerprint(model))
        if difference:
            raise ValueError(f"the trajectory is of another model: {difference}; invert the picture with this model.")
        mine = tuple(self.latents.shape[1:])
        if shape is not None and tuple(shape) != mine:
            what = "a batch" if tuple(shape[1:]) == mine[1:] else "a size"
            raise ValueError(
                f"the trajectory is of {what} other than the latent's: {mine} and {tuple(shape)} (batch, channels, "
                "height, width); sample the latent that was inverted."
            )
        if sigmas is not None:
            its = self.sigmas[-len(sigmas):].to(sigmas)
            if len(its) < len(sigmas) or not torch.allclose(its, sigmas, rtol=1e-4, atol=1e-5):
                raise ValueError(
                    f"the trajectory has another schedule: {_listed(self.sigmas)}, the sampler's is {_listed(sigmas)}; "
                    "wire the sigmas of its inversion to the sampler: all of them where its noise is wired too, else "
                    "their last steps will also do."
                )


def _listed(sigmas):
    return f"{len(sigmas) - 1} steps from sigma {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}"
