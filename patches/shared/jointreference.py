"""Tokens of a reference beside the attention that text and image of a transformer share (models/identity/joint.py)."""

from dataclasses import dataclass, replace

import torch

from .architectures import flux, sd3
from .attention import Attention, plain
from .reference import Projected, Reference
from .steering import Weak, blame

EPS = 1e-5  # of the RMS that InstantX divides keys and values by


def blocks_of(model, adapter):
    """Layers of a ModelPatcher in the order of the adapter's file; ValueError where it is made for another network."""
    network, name = model.get_model_object("diffusion_model"), type(model.model).__name__
    family = sd3 if adapter.timed else flux
    if not family.matches(network):
        raise ValueError(f"{adapter.name} is made for {adapter.model}, and this model is {name}.")
    found = [(block.layer, _width(block.module)) for block in family.blocks(network)]
    if adapter.after:
        found = [each for each in found if each[0].group == "double"]
    here = tuple(width for _, width in found)
    if here != adapter.hidden:
        raise ValueError(
            f"{adapter.name} is made for {len(adapter.hidden)} blocks of width {adapter.hidden[0]}; this model "
            f"({name}) has {len(here)} of width {here[0]}. Take the adapter that is made for it."
        )
    return tuple(layer for layer, _ in found)


def _width(block):
    return block.hidden_size if hasattr(block, "hidden_size") else block.x_block.attn.qkv.in_features


def beside(model, adapter):
    """A clone of `model` with which the host loads the adapter's network: it runs at every step."""
    model = model.clone()
    model.set_additional_models(f"steer.{adapter.digest}", [adapter.patcher])
    return model


@dataclass(frozen=True)
class JointReference(Reference):
    """As `Reference`, for transformers: the image asks with its queries before they are given a place.

    XLabs adds s w_l M A(q, W_k e, W_v e) to the image tokens that a double block leaves; InstantX to what attention
    puts out, in single blocks of the text too, with keys and values of RMS 1 by head; for SD3.5 it is
    A(n_q q, [n_k k, W_k e], [v, W_v e]) with k, v of the image, where e and the norms n are the file's, e of the time.

    patches: hidden states of each picture, where they are what `tokens` holds.
    """

    patches: int = 0

    def places(self, model):
        return [(layer, 0) for layer in blocks_of(model, self.adapter)]

    def projected(self, run):
        return (Timed if self.adapter.timed else Joint)(self, run)

    def attention(self, model):
        self.places(model)
        if self.adapter.after:
            return ()
        layers, negative = tuple(layer for layer, w in self.weights if w), self.unconditional is not None
        return (Attention("self", layers, self.edit, negative=negative, raw=True),)

    def after(self, model):
        return tuple((layer, self.follow) for layer, w in self.weights if w and self.adapter.after)

    def edit(self, target, beside, attend, call, weight, role):
        out, joint = attend(target), call.run.state[self]
        with blame(self):
            return joint.join(out, target, call, role, self.strength * weight)

    def follow(self, hidden, target, call, weight, role):
        if self.unconditional is None and role != "positive" and not isinstance(role, Weak):
            return hidden
        with blame(self):
            asking = replace(target, q=_queries(target))
            return call.run.state[self].add(hidden, asking, role, self.strength * weight)


class Joint(Projected):
    """Keys and values of each block for one run."""

    def __init__(self, term, run):
        super().__init__(term, run)
        self.by_head = not term.adapter.after

    def pair(self, target, name):
        k, v = super().pair(target, name)
        return (rms(k, target.heads), rms(v, target.heads)) if self.by_head else (k, v)

    def join(self, out, target, call, role, strength):
        """`out` [b, N, C] of a joint attention, with the reference's answer where tokens ask for it."""
        asking, at = _asking(target)
        part = self.add(out[:, at], asking, role, strength)
        return torch.cat((out[:, : at.start], part, out[:, at.stop :]), 1)


class Timed(Joint):
    """The same, where they are made anew at each noise level. The network is loaded beside the model."""

    def __init__(self, term, run):
        super().__init__(term, run)
        self.network, self.patches, self.sigma = term.adapter.patcher.model, term.patches, None
        self.given = {"positive": term.tokens} | (
            {} if term.unconditional is None else {"negative": term.unconditional}
        )
        self.numbers = {layer: n for n, (layer, _) in enumerate(term.places(run.model))}
        self.answer = self._answer

    def pair(self, target, name):
        return self.layer(target)(*self.states[name])

    def layer(self, target):
        return self.network.layers[self.numbers[target.layer]]

    def join(self, out, target, call, role, strength):
        if call.sigma is not self.sigma:
            self.sigma, self.states = call.sigma, {}
            self.fitted.clear()
            for name, x in self.given.items():
                n, x = len(x), x.to(target.q).unflatten(1, (-1, self.patches)).flatten(0, 1)
                e, time = self.network.image_proj(x, 1000 * call.sigma[:1])
                self.states[name] = e.unflatten(0, (n, -1)).flatten(1, 2), time[:1]
        return super().join(out, target, call, role, strength)

    def _answer(self, call, out):
        layer, raw = self.layer(call), call.raw
        q, k = (layer.by_head(f"norm_{name}", raw[name]) for name in "qk")
        return plain(replace(call, q=q, k=torch.cat((k, call.k), 1), v=torch.cat((raw["v"], call.v), 1)))


def rms(x, heads):
    """x [n, T, heads * d] with RMS 1 in each head."""
    x = x.unflatten(-1, (heads, -1))
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS).to(x)).flatten(-2)


def _asking(target):
    """(AttnCall of the tokens that ask, their slice): of the image, in a single block of the text before it too."""
    first, last, _ = slice(*target.image).indices(target.q.shape[1])
    if target.layer.group == "single":
        at, image = slice(0, last), (first, last)
    else:
        at, image = slice(first, last), (0, last - first)
    q, raw = _queries(target), {**target.raw, "v": target.v[:, at]}
    return replace(target, q=q[:, : at.stop - at.start], image=image, text=(0, image[0]), raw=raw), at


def _queries(target):
    if "q" not in target.raw:
        raise ValueError(f"another node replaces the block {target.layer}, so that its queries are not known.")
    return target.raw["q"]
