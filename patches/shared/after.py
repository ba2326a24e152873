"""What follows the blocks of a transformer, and what their attention asks with.

Terms edit the image tokens that a block leaves (`Term.after`): by the host's replacements of blocks, chained with those
of other nodes, so that what they put in a block's place comes first. A row that leaves out a block leaves out what
follows it too.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from .attention import AttnCall
from .steering import IDLE


@dataclass
class After:
    """edits: {Layer: {role: [edit]}} of what blocks leave.  asked: layers in which `raw` is kept, {name: [B, n, heads,
    d]} of the block that runs, as the `taps` of the architecture have it.  placed: layers in which `unplaced` is kept,
    as an `AttnCall` has it, heads apart."""

    edits: dict
    asked: frozenset
    placed: frozenset = frozenset()
    raw: dict = field(default_factory=dict)
    unplaced: tuple = ()

    def of(self, layer):
        """`raw` as an `AttnCall` has it."""
        return {name: t.flatten(2) for name, t in self.raw.items()} if layer in self.asked else {}

    def take(self, layer):
        """`unplaced` as an `AttnCall` has it, once."""
        kept, self.unplaced = self.unplaced, ()
        if layer not in self.placed or not kept:
            return ()
        *qk, pe = kept
        return *(t.transpose(1, 2).flatten(2) for t in qk), pe


NONE = After({}, frozenset())


def after_of(run, call, units):
    """The `After` of what is in this batch."""
    edits, asked, placed = {}, set(), set()
    roles = dict.fromkeys(unit.role for unit in units)
    targets = [role for role in roles if role != IDLE and not (call and role in call.source_roles)]
    for term, weight, _ in call.active if call else ():
        asked.update(layer for a in run.attention[term] if a.raw for layer in a.layers)
        placed.update(layer for a in run.attention[term] if a.unplaced for layer in a.layers)
        for layer, edit in run.after[term]:
            for role in targets:
                its = partial(edit, call=call, weight=weight, role=role)
                edits.setdefault(layer, {}).setdefault(role, []).append(its)
    return After(edits, frozenset(asked | edits.keys()), frozenset(placed))


@contextmanager
def kept(adapter, network, rows):
    """Keeps `After.raw` while one forward of `network` runs."""
    with ExitStack() as stack:
        for block in adapter.blocks(network) if rows.after.asked else ():
            if block.layer in rows.after.asked:
                for name, (module, read) in adapter.taps(block.module).items():
                    stack.callback(module.register_forward_hook(partial(_keep, rows.after.raw, name, read)).remove)
        try:
            yield
        finally:
            rows.after.raw.clear()
            rows.after.unplaced = ()


def _keep(raw, name, read, module, args, output):
    raw[name] = read(args, output)


def place(options, rows):
    """Lets what attention asks with be kept before it gets its places, in a private copy of one call's
    transformer_options: after the patches of other nodes."""
    if rows.after.placed:
        patches = options["patches"] = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), partial(_unplaced, rows)]


def _unplaced(rows, q, k, v, pe, attn_mask, extra_options):
    if rows.layer in rows.after.placed:
        rows.after.unplaced = q, k, pe
    return {}


def follow(options, rows):
    """Puts the edits of what blocks leave into a private copy of one call's transformer_options."""
    if rows.after.edits:
        replaced = options["patches_replace"] = dict(options.get("patches_replace", {}))
        at = replaced["dit"] = dict(replaced.get("dit", {}))
        for layer in rows.after.edits:
            key = f"{layer.group}_block", layer.index
            at[key] = partial(_followed, rows, layer, at.get(key))


def _followed(rows, layer, previous, args, extra):
    raw = rows.after.raw
    raw.clear()
    out = extra["original_block"](args) if previous is None else previous(args, extra)
    img, options = out["img"], args["transformer_options"]
    first = 0 if "txt" in out else options["img_slice"][0]
    image = slice(first, img.shape[1] - sum(options.get("reference_image_num_tokens", ())))
    inside = [each for each in rows.parts() if each[0].role not in rows.skips.get(layer, ())]
    for n, (unit, at) in enumerate(inside):
        its = img[at, image]
        own = {name: t[n * rows.size : (n + 1) * rows.size, image] for name, t in raw.items()}
        heads, own = (own["q"].shape[2] if own else 1), {name: t.flatten(2) for name, t in own.items()}
        target = AttnCall(its, its, its, heads, layer, "cross", text=(0, None), shape=rows.shape, raw=own)
        hidden = its
        for edit in rows.after.edits[layer].get(unit.role, ()):
            hidden = edit(hidden, target)
        if hidden is not its:
            img[at, image] = hidden
    raw.clear()
    return out
