"""HunyuanVideo (1.0, 1.5) and HunyuanImage, built of Flux's blocks."""

from . import dit, flux

name = "HunyuanVideo (1.0, 1.5), HunyuanImage"
tagged = True
blocks, tail, tokens = flux.blocks, flux.tail, flux.tokens


def matches(diffusion_model):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    return isinstance(diffusion_model, HunyuanVideo)


def sharable(diffusion_model):
    return True


def patch(options, rows, network):
    dit.patch(options, rows, tokens)
