"""Texts that are asked about the positive's picture: what another prompt would make of the same image tokens, block by
block, for networks that carry text and image in streams of their own."""

import uuid
from dataclasses import replace

from .conditioning import text_of
from .steering import Text


def about(name, conditioning):
    """A `Text` branch of a CONDITIONING that mirrors the positive and has all else of it (ControlNet, guidance)."""
    (context, options), *_ = conditioning

    def conds(guider):
        positive, *_ = guider.conds["positive"]
        own = {"cross_attn": context, **options, "model_conds": dict(positive["model_conds"]), "uuid": uuid.uuid4()}
        return [{**{key: value for key, value in positive.items() if key != "attention_mask"}, **own}]

    return replace(text_of(name, conditioning), conds=conds, mirrors=True)


def mirrors_of(roles, edits, blocks):
    """({layer: roles that mirror there}, {layer: roles that leave it out}) of the roles in a forward.

    edits: as `rows.Rows` has them.  blocks: of the network, in order.
    """
    mirrors, skips = {}, {}
    order = list(dict.fromkeys(block.layer for block in blocks))
    for role in roles:
        if isinstance(role, Text) and role.mirrors:
            read = [
                order.index(layer) for (layer, _), at in edits.items()
                if any(role in (edited.beside or ()) for chain in at.values() for edited in chain)
            ]
            last = max(read, default=-1)
            for n, layer in enumerate(order):
                (mirrors if n <= last else skips).setdefault(layer, set()).add(role)
    return mirrors, skips


def mirrored(rows, block, names, args, kwargs):
    """The arguments of a block's forward with the image tokens of those that mirror as the positive's."""
    parts = rows.parts()
    positive = next((at for unit, at in parts if unit.role == "positive"), None)
    if positive is None:
        return args, kwargs

    def image(h):
        h = h.clone()
        for unit, at in parts:
            if unit.role in rows.mirrors[block.layer]:
                h[at] = h[positive]
        return h

    if block.image in kwargs:
        return args, {**kwargs, block.image: image(kwargs[block.image])}
    at = names.index(block.image)
    return (*args[:at], image(args[at]), *args[at + 1 :]), kwargs
