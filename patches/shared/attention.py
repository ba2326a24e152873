"""One attention call, whatever the architecture, and edits that act on some of its rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from .layers import Layer


@dataclass(frozen=True)
class AttnCall:
    """Arguments of one attention, batch first.

    q: [B, N, heads * d]; k, v: [B, M, heads * d].
    mask: additive or boolean, broadcastable to [B, heads, N, M], or None.
    kind: "self", "cross" or "joint" (text and image in one sequence).
    text, image: (first, last) token of the sequence that holds text and image; last None for its end.
    shape: of the latent that this forward works on, [B, C, (T,) H, W].
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

    def grid(self):
        """(T, H, W) of the image tokens; ValueError where they do not lie on a grid."""
        tokens = len(range(self.q.shape[1])[slice(*self.image)])
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
        return replace(self, **dict(zip("qkv", cut, strict=True)), mask=mask)


def cut_mask(mask, first, last, rows):
    """Rows first..last of a mask for a batch of `rows`; one without a batch dimension serves them all."""
    return mask[first:last] if mask is not None and mask.ndim > 2 and mask.shape[0] == rows else mask


Edit = Callable[[AttnCall], AttnCall | torch.Tensor]


def chunked(edits):
    """Consecutive equal entries of `edits` as (edit, slice of them)."""
    first = 0
    for edit, run in groupby(edits):
        last = first + len(list(run))
        yield edit, slice(first, last)
        first = last


def attend(call, edits, attention):
    """Runs `call`, each chunk of the batch through its own edit.

    edits: one entry per chunk of the batch (equal, consecutive chunks): an edit, or None for plain attention.
    attention: (AttnCall, chunks) -> output [b, N, heads * d] for the chunks named by that slice.
    An edit returns a changed call, which then is attended, or the output itself, which costs no attention.
    """
    size = call.q.shape[0] // len(edits)
    outputs = []
    for edit, chunks in chunked(edits):
        part = call.rows(chunks.start * size, chunks.stop * size)
        out = part if edit is None else edit(part)
        outputs.append(attention(out, chunks) if isinstance(out, AttnCall) else out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
