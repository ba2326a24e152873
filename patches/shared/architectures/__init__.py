"""What differs between networks: how blocks are called, where attention is found, which tokens are what.

An adapter is a module or class with
    name                          what users call the architecture
    matches(diffusion_model)      does it serve this network?
    blocks(diffusion_model)       its `rows.Block`s in forward order, between embedding and output layer; () where rows
                                  cannot be told apart (frames of a video in the batch)
    tail(diffusion_model)         the module after the last block; None where there is none that sees all rows
    sharable(diffusion_model)     True where rows may share blocks: all that happens between them follows the rows
    patch(options, rows, network) puts what `rows` need into a private copy of one call's transformer_options
    taps(block)                   {name: (module in it, (args, output) -> [B, N, heads, d])}: where queries (and keys)
                                  are before the network places them; not all adapters have it
    tagged                        True where attention finds its edits by the block that runs, which takes hooks
"""

from contextlib import contextmanager

from ..after import kept
from ..layers import listing, resolve
from ..rows import Residual
from . import flux, hunyuan, lumina, qwen, sd3, unet, wan

ADAPTERS = (unet, flux, sd3, lumina, qwen, wan, hunyuan)


def self_attention_layers(model, text, auto):
    """Self-attention layers of a ModelPatcher by name. auto: {adapter name: the method's own default}."""
    return _layers(model, text, auto, "attends")


def one_attention(model):
    """True where text and image of a ModelPatcher share one attention."""
    return adapter_of(model.model) not in (unet, wan)


def skippable_layers(model, text, auto):
    """Layers of a ModelPatcher that can be left out, by name."""
    return _layers(model, text, auto, "skippable")


def editable_layers(model, text):
    """Layers of a ModelPatcher whose output can be edited, by name; "middle" is the h-space of a UNet."""
    network = model.get_model_object("diffusion_model")
    if not unet.matches(network):
        raise ValueError(
            f"works in the h-space of a UNet (SD1.x, SD2.x, SDXL), which {type(model.model).__name__} does not have."
        )
    return resolve(text, unet.editable(network))


def residual_layers(model, text):
    """The decoder's blocks of a UNet ModelPatcher that add to what goes into them, by name, as `Residual`s."""
    network = model.get_model_object("diffusion_model")
    if not unet.matches(network):
        raise ValueError(
            f"takes features of the blocks of a UNet (SD1.x, SD2.x, SDXL), which {type(model.model).__name__} does not "
            "have."
        )
    found = (block.layer for block in unet.blocks(network) if block.residual is not None)
    return tuple(map(Residual, resolve(text, tuple(dict.fromkeys(found)))))


def _layers(model, text, auto, part):
    adapter = adapter_of(model.model)
    blocks = adapter.blocks(model.get_model_object("diffusion_model"))
    available = tuple(dict.fromkeys(block.layer for block in blocks if getattr(block, part)))
    if text.strip() == "auto":
        if adapter.name not in auto:
            raise ValueError(f'has no "auto" for {adapter.name}; name layers: {listing(available)}.')
        text = auto[adapter.name]
    return resolve(text, available)


def shared_blocks(model):
    """The blocks over which rows of one batch may share work; () where there is no adapter, or it is not safe."""
    network = model.get_model_object("diffusion_model")
    adapter = next((adapter for adapter in ADAPTERS if adapter.matches(network)), None)
    return adapter.blocks(network) if adapter and adapter.sharable(network) else ()


def depth(weak, blocks):
    """Number of the first of `blocks` in which a `steering.Weak` branch differs from the positive."""
    part = "skippable" if weak.edit is None else "attends"
    return next(n for n, block in enumerate(blocks) if block.layer in weak.layers and getattr(block, part))


def adapter_of(model):
    """The adapter for a BaseModel; raises ValueError, naming what is supported, when there is none."""
    network = model.diffusion_model
    for adapter in ADAPTERS:
        if adapter.matches(network):
            return adapter
    known = ", ".join(adapter.name for adapter in ADAPTERS)
    raise ValueError(f"cannot act on {type(model).__name__} ({type(network).__name__}); supported: {known}.")


def needs_hooks(adapter, rows):
    inside = any(isinstance(place, Residual) for place in rows.features)
    at_blocks = rows.edits or rows.after.edits
    return bool(rows.shares or rows.skips or rows.mirrors or inside or (at_blocks and adapter.tagged))


@contextmanager
def hold(adapter, network, options, rows):
    """`rows` at work in one forward of `network`."""
    adapter.patch(options, rows, network)
    if needs_hooks(adapter, rows):
        with rows.on(adapter.blocks(network), adapter.tail(network)), kept(adapter, network, rows):
            yield
    else:
        yield
