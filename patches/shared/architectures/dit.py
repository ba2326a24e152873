"""What transformers have in common: the first attention of a block is the one that methods edit."""

from functools import partial

import torch

from ..attention import AttnCall, chunked, cut_mask

ARGUMENTS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of the host's attention, after heads


def patch(options, rows, tokens, kind="joint"):
    """Lets attention of the blocks with edits go through them, in a private copy of one call's transformer_options.

    tokens: (rows, transformer_options, N) -> (first, last) of the N tokens that are text, and that are image.
    An override that another node placed is kept: it serves the rows without an edit.
    """
    if rows.edits:
        name = "optimized_attention_override"
        options[name] = partial(_attention, rows, tokens, kind, options.get(name))


def _attention(rows, tokens, kind, previous, function, q, k, v, heads, *args, **kwargs):
    attention = partial(previous, function) if previous else function
    edits = rows.chunks(rows.layer)
    if not any(edits):
        return attention(q, k, v, heads, *args, **kwargs)

    layer, rows.layer = rows.layer, None  # what follows in this block (cross-attention, a second one) stays as it is
    kwargs = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    options, mask, by_head = (kwargs.get(name) for name in ("transformer_options", "mask", "skip_reshape"))
    text, image = tokens(rows, options, q.shape[2 if by_head else 1])
    size, outputs = q.shape[0] // len(edits), []
    for edit, chunks in chunked(edits):
        first, last = chunks.start * size, chunks.stop * size
        part = [t[first:last] for t in (q, k, v)]
        # whoever attends here sees the options of these chunks alone
        own = {**options, **{name: options[name][chunks] for name in ("cond_or_uncond", "uuids")}}
        own = {**kwargs, "mask": cut_mask(mask, first, last, q.shape[0]), "transformer_options": own}
        if edit is None:
            outputs.append(attention(*part, heads, **own))
            continue
        part = [t.transpose(1, 2).flatten(2) if by_head else t.flatten(2) for t in part]
        out = edit(AttnCall(*part, heads, layer, kind, own["mask"], text, image, rows.shape))
        if isinstance(out, AttnCall):
            own |= {"mask": out.mask, "skip_reshape": False, "skip_output_reshape": False}
            out = attention(out.q, out.k, out.v, heads, **own)
        if kwargs.get("skip_output_reshape"):
            out = out.unflatten(2, (heads, -1)).transpose(1, 2)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
