"""One attention call, whatever the architecture, and edits that act on some of its rows."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch

from .layers import Layer


@dataclass(frozen=True)
class AttnCall:
    """Arguments of one attention, batch first.

    q: [B, N, heads * d]; k, v: [B, M, heads * d].
    mask: additive or boolean, broadcastable to [B, heads, N, M], or None.
    kind: "self", "cross" or "joint" (text and image in one sequence).
    text, image: (first, last) token of the sequence that holds text and image; last None for its end. Of "cross", text
        is where the keys are, image where the queries are.
    shape: of the latent that this forward works on, [B, C, (T,) H, W].
    depth: number of the transformer in its layer.
    precision: dtype in which the host multiplies q and k; None for their own.
    raw: of transformers, where an `Attention` asks for it: what the network asks with before it is given its place,
        {"q": [B, n, heads * d], ...}, as the `taps` of the architecture have it.
    unplaced: of the Flux family, where an `Attention` asks for it: (q, k, pe), queries and keys [B, N, heads * d] of
        all tokens before they get their places, and the rotations [B or 1, 1, N, d / 2, 2, 2] that give them these.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    layer: Layer
    kind: str = "self"
    mask: torch.Tensor | None = None
    text: tuple[int, int | None] = (0, 0)
    image: tuple[int, int | None] = (0, None)
    shape: tuple[int, ...] = ()
    depth: int = 0
    precision: torch.dtype | None = None
    raw: dict = field(default_factory=dict)
    unplaced: tuple = ()

    @property
    def places(self):
        """Number of image tokens."""
        return len(range(self.q.shape[1])[slice(*self.image)])

    def grid(self):
        """(T, H, W) of the image tokens; ValueError where they do not lie on a grid."""
        tokens = self.places
        t, h, w = (1, 1, *self.shape[2:])[-3:] if len(self.shape) > 3 else (0, 0, 0)
        while h * w * t > tokens and (h > 1 or w > 1):
            h, w = (h + 1) // 2, (w + 1) // 2  # as strided convolutions and patches leave them
        if h * w * t == tokens and self.q.shape[0] <= self.shape[0]:  # more rows than the latent has are tiles
            return t, h, w
        raise ValueError(
            f"{tokens} image tokens in layer {self.layer} do not cover the latent {tuple(self.shape)} as a grid; "
            "another node (tiling, token merging, reference images) has changed them."
        )

    def rows(self, first, last):
        """The same call for rows first..last of the batch."""
        cut = (t[first:last] for t in (self.q, self.k, self.v))
        mask = cut_mask(self.mask, first, last, self.q.shape[0])
        raw = {name: t[first:last] for name, t in self.raw.items()}
        unplaced = tuple(t[first:last] if len(t) == len(self.q) else t for t in self.unplaced)
        return replace(self, **dict(zip("qkv", cut, strict=True)), mask=mask, raw=raw, unplaced=unplaced)


def cut_mask(mask, first, last, rows):
    """Rows first..last of a mask for a batch of `rows`; one without a batch dimension serves them all."""
    return mask[first:last] if mask is not None and mask.ndim > 2 and mask.shape[0] == rows else mask


def plain(call):
    """The host's attention without anything that other nodes put in its place, [B, N, heads * d]."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(call.q, call.k, call.v, call.heads, call.mask, attn_precision=call.precision)


def image_from(source, target, names, weight=1.0):
    """The AttnCall `target` with `names` (of "q", "k", "v") of its image tokens from `source`, mixed in by `weight`."""
    changed = {}
    for name in names:
        s, t = (getattr(call, name)[:, slice(*call.image)] for call in (source, target))
        mixed = s.to(t) if weight == 1.0 else torch.lerp(t, s.to(t), weight)
        first, last, _ = slice(*target.image).indices(target.q.shape[1])
        around = getattr(target, name)
        changed[name] = torch.cat((around[:, :first], mixed, around[:, last:]), 1)
    return replace(target, **changed)


def additive(mask, dtype):
    """A mask of an `AttnCall` as numbers to add to scores, [B or 1, heads or 1, N or 1, M]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    return (mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask).to(dtype)


def biased(call, bias):
    """The same call with `bias` [B, M] added to the scores of each key."""
    bias = bias.to(call.q.dtype)[:, None, None]
    return replace(call, mask=bias if call.mask is None else bias + additive(call.mask, bias.dtype))


Edit = Callable[[AttnCall], AttnCall | torch.Tensor]  # of a weak branch: a changed call, or the output itself


@dataclass(frozen=True)
class Attention:
    """An edit of the attention in some layers, which a term makes to rows of the target.

    edit(target, beside, attend, call=, weight=, role=) -> output [b, N, heads * d]
        target: the AttnCall of the rows of one cond, whose prediction is `role`.
        beside: the AttnCalls of the roles named below, as many rows each, before any edit.
        attend: AttnCall -> output: what the edits after this one, then other nodes, then the host make of a call. It
            may be asked several times, a `Host` for some of the queries too; `plain` serves for what is added to the
            picture's own attention.
    kind: "self" or "cross"; where text and image share one attention, both mean that one.
    sets: what it replaces ("queries", "keys", "values", "map"): two nodes that replace the same, in one layer at one
        time, are refused.
    beside: branches of the term. A `Source` stands for its rows beside those that are edited.
    negative: whether rows under other texts than the positive are edited too.
    raw, unplaced: the AttnCalls come with these.
    """

    kind: str
    layers: tuple[Layer, ...]
    edit: Callable
    sets: tuple[str, ...] = ()
    beside: tuple = ()
    negative: bool = True
    raw: bool = False
    unplaced: bool = False


def perturb(edit, target, attend):
    """The `Edit` of a weak branch as the last before the host."""
    out = edit(target)
    return attend(out) if isinstance(out, AttnCall) else out


def chunked(plans):
    """Consecutive equal entries of `plans` as (plan, slice of them)."""
    first = 0
    for plan, run in groupby(plans):
        last = first + len(list(run))
        yield plan, slice(first, last)
        first = last


class Host(partial):
    """The attention that no edit follows, only other nodes and the host: it may be asked with some of the queries."""


def attend(call, plans, attention):
    """Runs `call`, each chunk of the batch through its own edits.

    plans: one entry per chunk of the batch (equal, consecutive chunks): a tuple of edits, each (target, attend=) ->
        output, the first of which comes first; empty for plain attention.
    attention: (AttnCall, chunks=) -> output [b, N, heads * d] for the chunks named by that slice.
    """
    size = call.q.shape[0] // len(plans)
    outputs = []
    for plan, chunks in chunked(plans):
        run = Host(attention, chunks=chunks)
        for edit in reversed(plan):
            run = partial(edit, attend=run)
        outputs.append(run(call.rows(chunks.start * size, chunks.stop * size)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
