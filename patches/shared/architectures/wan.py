"""Wan 2.1 and 2.2. Self-attention sees the video alone; text comes in by cross-attention."""

from ..layers import Layer
from ..rows import Block
from . import dit

name = "Wan (2.1, 2.2)"
tagged = True


def matches(diffusion_model):
    """All but the causal ones, whose attention also looks at frames of earlier calls."""
    from comfy.ldm.wan.model import WanModel

    return isinstance(diffusion_model, WanModel) and not type(diffusion_model).__name__.startswith("Causal")


def sharable(diffusion_model):
    """Other variants add speech, music or faces between the blocks, for all rows."""
    from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel

    return type(diffusion_model) in (WanModel, CameraWanModel, VaceWanModel)


def blocks(diffusion_model):
    """With VACE's own blocks, each after the block to whose result the host adds its own."""
    vace = getattr(diffusion_model, "vace_blocks", ())
    follows = getattr(diffusion_model, "vace_layers_mapping", {})
    found = []
    for i, block in enumerate(diffusion_model.blocks):
        found.append(Block(Layer("double", i), block, ("x",)))
        if i in follows:
            n = follows[i]
            found.append(Block(Layer("vace", n), vace[n], ("c",), attends=False, skippable=False))
    return tuple(found)


def tail(diffusion_model):
    return diffusion_model.head


def patch(options, rows, network):
    """Where an image is given too, cross-attention looks at it first."""
    image = hasattr(network.blocks[0].cross_attn, "k_img")
    dit.patch(options, rows, tokens, ("self", None, "cross") if image else ("self", "cross"))


def tokens(rows, options, length):
    return (0, 0), (0, length)
