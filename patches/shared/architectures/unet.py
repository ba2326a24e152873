"""The UNet of SD1.x, SD2.x, SDXL and their kin."""

from ..attention import AttnCall, attend
from ..layers import Layer

name = "UNet (SD1.x, SD2.x, SDXL)"


def matches(diffusion_model):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return isinstance(diffusion_model, UNetModel)


def self_attention(diffusion_model):
    """Layers whose transformer blocks attend from the image to itself."""
    from comfy.ldm.modules.attention import SpatialTransformer

    middle = [diffusion_model.middle_block] if diffusion_model.middle_block is not None else []
    groups = (
        ("input", diffusion_model.input_blocks),
        ("middle", middle),
        ("output", diffusion_model.output_blocks),
    )
    return tuple(
        Layer(group, i)
        for group, blocks in groups
        for i, block in enumerate(blocks)
        if any(isinstance(module, SpatialTransformer) for module in block)
    )


def edit_self_attention(options, edits):
    """Adds edits to one forward call.

    options: transformer_options of that call, a private shallow copy; changed in place, nested dicts replaced.
    edits: {Layer: [edit or None, one per chunk of the batch]}.
    A replacement that another node placed on the same layer is kept: it serves the chunks without an edit.
    """
    replacements = dict(options.get("patches_replace", {}))
    attn1 = replacements["attn1"] = dict(replacements.get("attn1", {}))
    options["patches_replace"] = replacements
    for layer, chunks in edits.items():
        block = tuple(layer)
        # (group, index) serves every transformer of the block, (group, index, transformer) takes precedence
        for key in [block, *(key for key in attn1 if key[:2] == block and len(key) == 3)]:
            attn1[key] = _replacement(layer, chunks, attn1.get(key))


def _replacement(layer, chunks, previous):
    def attn1_replace(q, k, v, extra_options):
        def attention(call, part):
            # whoever attends here sees the options of these chunks alone
            own = {**extra_options, **{name: extra_options[name][part] for name in ("cond_or_uncond", "uuids")}}
            return (previous or _optimized_attention)(call.q, call.k, call.v, own)

        return attend(AttnCall(q, k, v, extra_options["n_heads"], layer), chunks, attention)

    return attn1_replace


def _optimized_attention(q, k, v, extra_options):
    from comfy.ldm.modules.attention import optimized_attention

    precision = extra_options["attn_precision"]
    heads = extra_options["n_heads"]
    return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=extra_options)
