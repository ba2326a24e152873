"""What must hold of a picture before it is inverted or edited; the messages go behind the node's name."""

import torch


def check_latent(latent):
    """Raises ValueError unless `latent` [B, C, ...] is one picture, or a batch of them."""
    if getattr(latent, "is_nested", False):
        raise ValueError("takes one latent, and this one holds several (video with audio).")
    if not torch.count_nonzero(latent):
        raise ValueError("the latent is empty, there is no picture in it; wire VAE Encode to it.")


def check_sigmas(sigmas):
    """Raises ValueError unless `sigmas` [N + 1] fall to 0."""
    if len(sigmas) < 2:
        raise ValueError(f"there are {max(len(sigmas) - 1, 0)} steps in the sigmas; give it one at least.")
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            "the sigmas must fall with every step; choose another scheduler, fewer steps, or no FlipSigmas."
        )
    if float(sigmas[-1]) != 0.0:
        raise ValueError(f"the sigmas end at {float(sigmas[-1]):.4g}; they must end at 0, where the picture is.")
