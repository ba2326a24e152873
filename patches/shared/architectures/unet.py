"""The UNet of SD1.x, SD2.x, SDXL and their kin."""

from functools import partial

from ..attention import AttnCall, attend
from ..layers import Layer
from ..rows import Block

name = "UNet (SD1.x, SD2.x, SDXL)"
tagged = False
ATTENTION = {"self": "attn1", "cross": "attn2"}  # as the host calls them


def matches(diffusion_model):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return isinstance(diffusion_model, UNetModel)


def sharable(diffusion_model):
    return True


def blocks(diffusion_model):
    """The modules inside the blocks: the host calls these, not the blocks."""
    from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, VideoResBlock

    middle = [diffusion_model.middle_block] if diffusion_model.middle_block is not None else []
    groups = (
        ("input", diffusion_model.input_blocks),
        ("middle", middle),
        ("output", diffusion_model.output_blocks),
    )
    found = []
    for group, members in groups:
        for i, member in enumerate(members):
            for module in member:
                if isinstance(module, (VideoResBlock, SpatialVideoTransformer)):
                    return ()
                attends = isinstance(module, SpatialTransformer)
                # what adds to its input and keeps the shape
                adds = isinstance(module, ResBlock)
                keeps = attends or adds and module.channels == module.out_channels and not module.updown
                inner = module.out_layers[-1] if adds and group == "output" else None
                found.append(Block(Layer(group, i), module, ("x",), attends, keeps, residual=inner))
    return tuple(found)


def tail(diffusion_model):
    return diffusion_model.out


def patch(options, rows, network):
    """A replacement that another node placed on the same layer is kept: it serves the rows without an edit."""
    replacements = dict(options.get("patches_replace", {}))
    options["patches_replace"] = replacements
    for layer, kind in rows.edits:
        name, block = ATTENTION[kind], tuple(layer)
        at = replacements[name] = dict(replacements.get(name, {}))
        # (group, index) serves every transformer of the block, (group, index, transformer) takes precedence
        for key in [block, *(key for key in at if key[:2] == block and len(key) == 3)]:
            at[key] = _replacement(layer, kind, rows, at.get(key))
    if rows.shares or rows.features:
        patches = options["patches"] = dict(options.get("patches", {}))
        patches["output_block_patch"] = [partial(_between_blocks, rows), *patches.get("output_block_patch", ())]


def cross_attentions(diffusion_model):
    """[(Layer, number of the transformer in it, its module)] of all cross-attentions, in the order of the forward."""
    return [
        (block.layer, depth, transformer.attn2)
        for block in blocks(diffusion_model) if block.attends
        for depth, transformer in enumerate(block.module.transformer_blocks) if transformer.attn2 is not None
    ]


def editable(diffusion_model):
    """Layers whose output can be edited: "middle" is the h-space of Asyrp, with ControlNet's share in it."""
    outputs = len(diffusion_model.output_blocks)
    return (Layer("middle", 0), *(Layer("output", i) for i in range(outputs - 1)))


def _between_blocks(rows, h, hsp, options):
    """Before an output block: what came out of the one before is edited, and the skip connection, from before some rows
    joined, gets their rows."""
    i = options["block"][1]
    for edit in rows.features.get(Layer("output", i - 1) if i else Layer("middle", 0), ()):
        h = edit(h, rows)
    return h, hsp if hsp is None or not rows.shares else rows.conform(hsp)


def _replacement(layer, kind, rows, previous):
    def replace(q, k, v, extra_options):
        def attention(call, chunks):
            # whoever attends here sees the options of these chunks alone
            own = {**extra_options, **{name: extra_options[name][chunks] for name in ("cond_or_uncond", "uuids")}}
            if previous is None:
                return _optimized_attention(call, own)
            if call.mask is not None:
                raise ValueError(
                    f"Steer: another node replaces the attention of layer {layer}, and cannot be told to leave out a "
                    "part; take it off, or choose other layers."
                )
            return previous(call.q, call.k, call.v, own)

        heads, precision = extra_options["n_heads"], extra_options["attn_precision"]
        text = (0, None) if kind == "cross" else (0, 0)
        call = AttnCall(
            q, k, v, heads, layer, kind, text=text, shape=rows.shape, depth=extra_options.get("block_index", 0),
            precision=precision,
        )
        return attend(call, rows.plans(call), attention)

    return replace


def _optimized_attention(call, options):
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(
        call.q, call.k, call.v, call.heads, call.mask, attn_precision=call.precision, transformer_options=options
    )
