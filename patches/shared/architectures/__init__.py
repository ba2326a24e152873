"""What differs between networks: how blocks are called, where attention is found, which tokens are what.

An adapter is a module or class with
    name                                  what users call the architecture
    matches(diffusion_model)              does it serve this network?
    self_attention(diffusion_model)       the layers that have self-attention, in forward order
    edit_self_attention(options, edits)   adds edits to a private copy of one call's transformer_options
"""

from ..layers import resolve
from . import unet

ADAPTERS = (unet,)


def self_attention_layers(model, text, auto):
    """Self-attention layers of a ModelPatcher by name. auto: {adapter name: the method's own default}."""
    adapter = adapter_of(model.model)
    available = adapter.self_attention(model.get_model_object("diffusion_model"))
    return resolve(auto[adapter.name] if text.strip() == "auto" else text, available)


def adapter_of(model):
    """The adapter for a BaseModel; raises ValueError, naming what is supported, when there is none."""
    network = model.diffusion_model
    for adapter in ADAPTERS:
        if adapter.matches(network):
            return adapter
    known = ", ".join(adapter.name for adapter in ADAPTERS)
    raise ValueError(f"cannot act on {type(model).__name__} ({type(network).__name__}); supported: {known}.")
