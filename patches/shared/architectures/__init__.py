"""What differs between networks: how blocks are called, where attention is found, which tokens are what.

An adapter is a module or class with
    name                                  what users call the architecture
    matches(diffusion_model)              does it serve this network?
    self_attention(diffusion_model)       the layers that have self-attention, in forward order
    edit_self_attention(options, edits)   adds edits to a private copy of one call's transformer_options
"""

from . import unet

ADAPTERS = (unet,)


def adapter_of(model):
    """The adapter for a BaseModel; raises ValueError, naming what is supported, when there is none."""
    network = model.diffusion_model
    for adapter in ADAPTERS:
        if adapter.matches(network):
            return adapter
    known = ", ".join(adapter.name for adapter in ADAPTERS)
    raise ValueError(f"cannot act on {type(model).__name__} ({type(network).__name__}); supported: {known}.")
