"""Flux and the transformers built of its blocks: Flux, Flux2, Chroma, Chroma Radiance."""

from ..after import follow, place
from ..layers import Layer
from ..rows import Block
from . import dit

name = "Flux (Flux, Flux2, Chroma)"
tagged = True


def matches(diffusion_model):
    from comfy.ldm.chroma.model import Chroma
    from comfy.ldm.flux.model import Flux

    return isinstance(diffusion_model, (Flux, Chroma))


def sharable(diffusion_model):
    """Radiance reshapes what comes out of the last block before any module sees it."""
    return tail(diffusion_model) is not None


def blocks(diffusion_model):
    pairs, streams = enumerate(diffusion_model.double_blocks), ("img", "txt")
    double = (Block(Layer("double", i), b, streams, image="img") for i, b in pairs)
    single = (Block(Layer("single", i), b, ("x",)) for i, b in enumerate(diffusion_model.single_blocks))
    return (*double, *single)


def tail(diffusion_model):
    return getattr(diffusion_model, "final_layer", None)


def patch(options, rows, network):
    dit.patch(options, rows, tokens)
    follow(options, rows)
    place(options, rows)


def taps(block):
    """Queries after they are normalised and before they are rotated: of the image, in a single block of all tokens."""
    norm = block.img_attn.norm if hasattr(block, "img_attn") else block.norm
    return {"q": (norm, lambda args, output: output[0].transpose(1, 2))}


def tokens(rows, options, length):
    """Text comes first, reference images last."""
    text = rows.streams["txt"].shape[1] if "txt" in rows.streams else options["img_slice"][0]
    return (0, text), (text, length - sum(options.get("reference_image_num_tokens", ())))
