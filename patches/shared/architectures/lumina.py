"""NextDiT: Lumina Image 2.0, Z-Image and their kin. Layers after the refiners are double.N, as the host calls them."""

from functools import partial
from math import prod

from ..layers import Layer
from ..rows import Block
from . import dit

name = "NextDiT (Lumina 2, Z-Image)"
tagged = True


def matches(diffusion_model):
    from comfy.ldm.lumina.model import NextDiT

    return isinstance(diffusion_model, NextDiT)


def sharable(diffusion_model):
    """The variant that works on pixels reshapes what comes out of the last block before any module sees it."""
    return tail(diffusion_model) is not None


def blocks(diffusion_model):
    return tuple(Block(Layer("double", i), b, ("x",)) for i, b in enumerate(diffusion_model.layers))


def tail(diffusion_model):
    return getattr(diffusion_model, "final_layer", None)


def patch(options, rows, network):
    dit.patch(options, rows, partial(tokens, network))


def tokens(network, rows, options, length):
    """The picture comes last, filled up to a multiple; before it text and, if any, reference images."""
    image = prod(-(-side // network.patch_size) for side in rows.shape[-2:])
    first = length - image - -image % (network.pad_tokens_multiple or 1)
    return (0, first), (first, first + image)
