"""The MMDiT of Stable Diffusion 3 and 3.5. Its joint blocks are the layers double.N."""

from ..layers import Layer
from ..rows import Block
from . import dit

name = "MMDiT (SD3, SD3.5)"
tagged = True


def matches(diffusion_model):
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    return isinstance(diffusion_model, MMDiT)


def sharable(diffusion_model):
    return True


def blocks(diffusion_model):
    """The joint attention of a block comes before the one over the image alone that SD3.5 medium adds (attn2)."""
    streams = ("context", "x")
    return tuple(
        Block(Layer("double", i), b, streams, arguments=streams, image="x")
        for i, b in enumerate(diffusion_model.joint_blocks)
    )


def tail(diffusion_model):
    return diffusion_model.final_layer


def patch(options, rows, network):
    dit.patch(options, rows, tokens)


def taps(block):
    """Queries and keys of the image before they are normalised."""
    attention = block.x_block.attn
    return {name: (norm, lambda args, output: args[0]) for name, norm in (("q", attention.ln_q), ("k", attention.ln_k))}


def tokens(rows, options, length):
    text = rows.streams["context"].shape[1]
    return (0, text), (text, length)
