"""Attention of the picture to its text, word by word, without ever holding a map of it: what a word gets is attention
with that word's columns as the values."""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from .attention import Host, plain

FILL = 32  # multiple to which some networks (Z-Image) fill a text up, at its end


def span(call):
    """(first, last) of the keys that are text."""
    return slice(*call.text).indices(call.k.shape[1])[:2]


def on_keys(values, call, dim=-1):
    """Values of a prompt's columns along `dim`, as the host has the columns among the text keys: repeated as a whole
    to a common length in cross-attention, filled up at the end otherwise; there 0.

    ValueError where the text is not that prompt's.
    """
    first, last = span(call)
    n, tokens = values.shape[dim], last - first
    if call.kind == "cross" and tokens % n == 0:
        return values.repeat_interleave(1, dim) if tokens == n else torch.cat([values] * (tokens // n), dim)
    if not 0 <= tokens - n < FILL:
        raise ValueError(
            f"layer {call.layer} sees {tokens} columns of text where the prompt has {n}; another node has changed the "
            "conditioning: take it off, or wire the prompt as it was encoded."
        )
    return pad(values, (*(0, 0) * (-1 - dim if dim < 0 else values.ndim - 1 - dim), 0, tokens - n))


def to_text(call):
    """The call of the image's queries to the text's keys alone: a softmax over the text."""
    if call.kind == "cross" or call.text == (0, None):
        return call
    keys = slice(*span(call))
    asked = asking(call, slice(*slice(*call.image).indices(call.q.shape[1])))
    mask = None if asked.mask is None else asked.mask[..., keys]
    return replace(asked, k=call.k[:, keys], v=call.v[:, keys], mask=mask, text=(0, None), image=(0, None))


def asking(call, queries):
    """The call of some of its queries, a slice or a tensor of numbers."""
    mask = call.mask
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., queries, :]
    return replace(call, q=call.q[:, queries], mask=mask)


def answers(attend, call, queries):
    """What `attend` makes of some queries; they are asked alone unless edits follow, which look at all of them."""
    return attend(asking(call, queries)) if isinstance(attend, Host) else attend(call)[:, queries]


def around(call):
    """Numbers of the queries that are not the image's."""
    places = torch.arange(call.q.shape[1], device=call.q.device)
    image = places[slice(*call.image)]
    return places[(places < image[0]) | (places > image[-1])]


def valued(call, columns):
    """The call with the same value for all channels of a key: `columns` [b or 1, keys]."""
    return replace(call, v=columns.to(call.v)[..., None].expand(*call.v.shape).contiguous())


def attention_to(call, columns, attend=plain):
    """How much the image attends to columns of its text, the mean of the heads: [b, places].

    columns: [b or 1, columns of the prompt], weights.  Where text and image share one attention, of the softmax over
    the text alone.
    """
    text = to_text(call)
    return attend(valued(text, on_keys(columns, text))).float().mean(-1)
