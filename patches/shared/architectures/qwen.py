"""Qwen-Image and Qwen-Image-Edit."""

from ..layers import Layer
from ..rows import Block
from . import dit

name = "Qwen-Image"
tagged = True


def matches(diffusion_model):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return isinstance(diffusion_model, QwenImageTransformer2DModel)


def sharable(diffusion_model):
    return True


def blocks(diffusion_model):
    streams, blocks = ("encoder_hidden_states", "hidden_states"), diffusion_model.transformer_blocks
    return tuple(Block(Layer("double", i), b, streams, image="hidden_states") for i, b in enumerate(blocks))


def tail(diffusion_model):
    return diffusion_model.norm_out


def patch(options, rows, network):
    dit.patch(options, rows, tokens)


def tokens(rows, options, length):
    """Text comes first, reference images last."""
    text = rows.streams["encoder_hidden_states"].shape[1]
    return (0, text), (text, length - sum(options.get("reference_image_num_tokens", ())))
