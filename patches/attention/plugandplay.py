"""Plug-and-Play features (Tumanyan et al. 2022, arXiv 2211.12572): layout and shapes of a source picture."""

from dataclasses import dataclass

import torch

from ..shared.architectures import (
    flux,
    hunyuan,
    lumina,
    qwen,
    residual_layers,
    sd3,
    self_attention_layers,
    unet,
    wan,
)
from ..shared.attention import Attention, image_from
from ..shared.layers import listing
from ..shared.source import covers, source_from
from ..shared.steering import Source, Term, blame, steer

DIT = dict.fromkeys((a.name for a in (flux, sd3, lumina, qwen, wan, hunyuan)), "0%-100%")  # the paper has none of them


def decoder(model):
    """The decoder's blocks of a UNet that attend, without the first: the paper's output.4-11 of Stable Diffusion."""
    return self_attention_layers(model, "output", {})[1:]


def on_unet(model):
    return unet.matches(model.get_model_object("diffusion_model"))


@dataclass(frozen=True)
class PlugAndPlay(Term):
    """softmax(q_s k_s^T) v_t in `layers`, for the positive and the negative alike (equation 4): who attends to whom is
    the source's, what is said the picture's own. Where text and image share one attention, this is of the image's q and
    k; text goes on as it is."""

    source: Source = None
    layers: str = "auto"
    node = "SteerPlugAndPlay"
    edits = True

    def prepare(self, run):
        covers(self.source, run)

    def branches(self, model):
        return (self.source,)

    def attention(self, model):
        auto = {unet.name: listing(decoder(model))} if on_unet(model) else DIT
        layers = self_attention_layers(model, self.layers, auto)
        return (Attention("self", layers, self.edit, ("queries", "keys"), (self.source,)),)

    def edit(self, target, beside, attend, call, weight, role):
        return attend(image_from(*beside, target, "qk", weight))


@dataclass(frozen=True)
class Features(Term):
    """What the ResBlock of a decoder block adds, from the source (equation 3); the picture's own skip is kept."""

    source: Source = None
    layers: str = "auto"
    node = PlugAndPlay.node
    edits = True
    prepare, branches = PlugAndPlay.prepare, PlugAndPlay.branches

    def features(self, model):
        text = listing(decoder(model)[:1]) if self.layers.strip() == "auto" else self.layers
        return [(place, self.put) for place in residual_layers(model, text)]

    def put(self, h, source, call, weight):
        return source if weight == 1.0 else torch.lerp(h, source, weight)


def apply(model, trajectory, layers, schedule, features, features_schedule, source=None):
    """A clone of `model` with the source's queries and keys in `layers`, and its features in the blocks `features`,
    each with a schedule of its own. "auto" features are output.4 in Stable Diffusion, and none on a DiT."""
    with blame(PlugAndPlay):
        branch = source_from(model, trajectory, source)
    model = steer(model, PlugAndPlay(schedule, branch, layers))
    if features.strip() == "auto" and not on_unet(model):
        return model
    return steer(model, Features(features_schedule, branch, features))
