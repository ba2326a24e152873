"""What transformers have in common: attention is told apart by its turn in the block."""

from functools import partial

from ..attention import AttnCall, attend

ARGUMENTS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of the host's attention, after heads
BY_TOKEN = {"skip_reshape": False, "skip_output_reshape": False}  # [B, N, heads * d] in and out


def patch(options, rows, tokens, kinds=("joint",)):
    """Lets attention of the blocks with edits go through them, in a private copy of one call's transformer_options.

    tokens: (rows, transformer_options, N) -> (first, last) of the N tokens that are text, and that are image.
    kinds: of the attentions in a block, in order; None for one that is left alone, as are those that follow.
    An override that another node placed is kept: it is what edits attend by.
    """
    if rows.edits:
        name = "optimized_attention_override"
        options[name] = partial(_attention, rows, tokens, kinds, options.get(name))


def _attention(rows, tokens, kinds, previous, function, q, k, v, heads, *args, **kwargs):
    attention = partial(previous, function) if previous else function
    kind, rows.turn = kinds[rows.turn] if rows.turn < len(kinds) else None, rows.turn + 1
    kwargs = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    if rows.layer is None or kind is None or not rows.edited(rows.layer, kind):
        return attention(q, k, v, heads, **kwargs)

    options, mask, by_head = (kwargs.get(name) for name in ("transformer_options", "mask", "skip_reshape"))
    q, k, v = ((t.transpose(1, 2) if by_head else t).flatten(2) for t in (q, k, v))
    text, image = ((0, None), (0, None)) if kind == "cross" else tokens(rows, options, q.shape[1])
    precision = kwargs.get("attn_precision")
    asked = {"raw": rows.after.of(rows.layer), "unplaced": rows.after.take(rows.layer)}
    call = AttnCall(q, k, v, heads, rows.layer, kind, mask, text, image, rows.shape, precision=precision, **asked)

    def attended(call, chunks):
        # whoever attends here sees the options of these chunks alone
        own = {**options, **{name: options[name][chunks] for name in ("cond_or_uncond", "uuids")}}
        own = {**kwargs, "mask": call.mask, "transformer_options": own, **BY_TOKEN}
        return attention(call.q, call.k, call.v, heads, **own)

    out = attend(call, rows.plans(call), attended)
    return out.unflatten(2, (heads, -1)).transpose(1, 2) if kwargs.get("skip_output_reshape") else out
