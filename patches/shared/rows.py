"""Rows of one forward that begin alike are computed once: a row joins where it begins to differ.

The host's batch has one chunk per cond. The rows of a weak cond equal those of the positive up to the first block that
the weak network perturbs. Hooks on the blocks, there for one forward, take such rows out before the first block and
put them back, as copies of what they equal, before the block from which on they differ. Embedding and output layer,
and so everything outside the blocks, see all rows.
"""

import inspect
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import NamedTuple

import torch

from .after import NONE
from .layers import Layer
from .mirror import mirrored

KINDS = {"joint": ("self", "cross")}  # kinds of edits that act on an attention


@dataclass(frozen=True)
class Block:
    """A module of the network that maps hidden states to hidden states, row by row.

    streams: names of the forward's arguments that hold the hidden states, in the order of its outputs.
    attends: holds the self-attention of its layer.  skippable: what comes out has the shape of what went in.
    arguments: names of the forward's first arguments, where its signature does not tell.
    image: the stream that holds image tokens alone, "" where there is none.
    residual: the module inside that puts out what the block adds to what went in, where that can be edited.
    """

    layer: Layer
    module: torch.nn.Module
    streams: tuple[str, ...]
    attends: bool = True
    skippable: bool = True
    arguments: tuple[str, ...] = ()
    image: str = ""
    residual: torch.nn.Module | None = None


class Residual(NamedTuple):
    """What a block adds to what went into it, before it is added."""

    layer: Layer

    def __str__(self):
        return f"what {self.layer} adds"


class Edited(NamedTuple):
    """An edit of the attention of one role: edit(target, attend=), and, where `beside` is not None, beside=, the
    AttnCalls of these roles."""

    edit: Callable
    beside: tuple | None = None


@dataclass(frozen=True)
class Unit:
    """Equal numbers of consecutive rows with one role.

    source: the unit whose rows it equals before block `joins`; its own number for one that is there from the start.
    """

    role: object
    index: int  # the host's cond_or_uncond
    uuid: object
    source: int
    joins: int = 0


class Rows:
    """The rows of one forward: which are in it right now, and what is done to their attention.

    units: the whole batch, in order.  shape: of the latent in it.
    edits: {(Layer, kind): {role: [Edited]}} of attention.  skips: {Layer: {role}}, blocks that these roles leave out.
    features: {Layer or Residual: [edit]} of what blocks put out or add, edit(h, rows) -> h.
    mirrors: {Layer: {role}}, whose image tokens are the positive's as they enter the block.
    kept: where attention of the roles `keeps` is left for forwards that follow, {(Layer, kind, depth, role): AttnCall}.
    after: `after.After`, what follows blocks; set by whoever makes the rows.
    """

    def __init__(self, options, units, shape, edits, skips, features=None, keeps=(), kept=None, mirrors=None):
        self.units, self.shape, self.edits, self.skips = units, tuple(shape), edits, skips
        self.features, self.keeps, self.kept, self.mirrors = features or {}, keeps, kept, mirrors or {}
        self.size = size = shape[0] // len(units)  # rows per unit
        self.joins = sorted({0, *(unit.joins for unit in units)})
        everyone = tuple(range(len(units)))
        self.stages = [tuple(u for u in everyone if units[u].joins <= joins) for joins in self.joins]
        self.shares = len(self.stages) > 1
        self.counts = {len(stage) * size: stage for stage in (*self.stages, everyone)}
        self.present = everyone
        self.layer = None  # of the block that runs
        self.turn = 0  # attentions that it has run
        self.streams = {}  # its hidden states, by name
        self.pushed = {}  # index of a UNet input block -> rows of its skip connection
        # the host copies the options, not these lists: all copies follow
        self.indices = options["cond_or_uncond"] = [unit.index for unit in units]
        self.uuids = options["uuids"] = [unit.uuid for unit in units]
        self.work = [0] * len(units)  # parameters times tokens that each unit passed through
        self.whole = 0  # of a unit that is always there
        self.fresh = False
        self.cache, self.indexed = {}, {}
        self.after = NONE

    def edited(self, layer, kind):
        """[{role: [Edited]}] of the attention of that kind in this layer."""
        return [self.edits[layer, k] for k in KINDS.get(kind, (kind,)) if (layer, k) in self.edits]

    def plans(self, call):
        """The edits of each unit in the forward, as `attention.attend` takes them, for the AttnCall of all of them."""
        found, place = self.edited(call.layer, call.kind), (call.layer, call.kind, call.depth)
        at = {}
        for unit, rows in self.parts():
            at.setdefault(unit.role, rows)
        for role in at.keys() & self.keeps:
            self.kept[(*place, role)] = call.rows(at[role].start, at[role].stop)

        def beside(role):
            rows = at.get(role)
            return self.kept.get((*place, role)) if rows is None else call.rows(rows.start, rows.stop)

        def plan(role):
            edits = [edited for roles in found for edited in roles.get(role, ())]
            return tuple(
                edit if roles is None else partial(edit, beside=tuple(map(beside, roles))) for edit, roles in edits
            )

        return [plan(unit.role) for unit, _ in self.parts()]

    def parts(self):
        """(unit, its rows as a slice) of those in the forward."""
        return [(self.units[u], slice(n * self.size, (n + 1) * self.size)) for n, u in enumerate(self.present)]

    def enter(self, depth, block=None):
        """The forward has come to block number `depth`."""
        stage = self.stages[bisect_right(self.joins, depth) - 1]
        if stage != self.present:
            self.become(stage)
            self.fresh = True
        elif self.fresh:  # what was resized last is hidden states, which nobody needs any more
            self.cache.clear()
            self.fresh = False
        self.layer, self.turn = block and block.layer, 0
        if block and block.layer.group == "input":
            self.pushed[block.layer.index] = stage

    def become(self, stage):
        self.cache.clear()
        self.present = stage
        self.indices[:] = [self.units[u].index for u in stage]
        self.uuids[:] = [self.units[u].uuid for u in stage]

    def conform(self, value, stage=None):
        """`value`, or what a list or dataclass of tensors holds, with the rows that are in the forward (or `stage`)."""
        stage = self.present if stage is None else stage
        if isinstance(value, torch.Tensor):
            have = self.counts.get(value.shape[0]) if value.ndim else None
            if len(stage) < len(self.units) and twice(value, len(self.units) * self.size):
                return torch.cat([self.conform(half, stage) for half in value.chunk(2)])
            if have is None or have == stage:
                return value
            key = id(value), stage
            if key not in self.cache:
                self.cache[key] = value, value.index_select(0, self.index(have, stage, value.device))
            return self.cache[key][1]
        return _map(value, lambda v: self.conform(v, stage))

    def index(self, have, want, device):
        """Row numbers in a tensor with the rows `have` that make the rows `want`."""
        key = have, want, device
        if key not in self.indexed:
            places = [have.index(u if u in have else self.units[u].source) for u in want]
            rows = [place * self.size + row for place in places for row in range(self.size)]
            self.indexed[key] = torch.tensor(rows, device=device)
        return self.indexed[key]

    def count(self, block):
        """Books this block, in the parameters that each token meets, on the units that run through it."""
        work = sum(p.numel() for p in block.module.parameters())
        hidden = [stream for stream in self.streams.values() if stream is not None]
        work *= sum(h.numel() // (h.shape[0] * h.shape[-1 if h.ndim == 3 else 1]) for h in hidden)
        self.whole += work
        for u in self.present:
            self.work[u] += work

    @contextmanager
    def on(self, blocks, tail):
        """Holds the hooks for one forward."""
        with ExitStack() as stack:

            def hook(register, function, **kwargs):
                stack.callback(register(function, **kwargs).remove)

            for depth, block in enumerate(blocks):
                skipping = _Skip(self, block) if block.skippable and block.layer in self.skips else None
                hook(block.module.register_forward_pre_hook, self._entry(depth, block, skipping), with_kwargs=True)
                if skipping:
                    hook(block.module.register_forward_hook, skipping.after)
                for edit in self.features.get(Residual(block.layer), ()) if block.residual is not None else ():
                    hook(block.residual.register_forward_hook, self._inside(edit))
            if tail is not None:
                hook(tail.register_forward_pre_hook, self._entry(len(blocks)), with_kwargs=True)
            try:
                yield
            finally:
                self.cache.clear()

    def _inside(self, edit):
        return lambda module, args, h: edit(h, self)

    def _entry(self, depth, block=None, skipping=None):
        names = block and (block.arguments or list(inspect.signature(block.module.forward).parameters))

        def before(module, args, kwargs):
            self.enter(depth, block)
            args = tuple(self.conform(value) for value in args)
            kwargs = {name: self.conform(value) for name, value in kwargs.items()}
            if block and block.layer in self.mirrors:
                args, kwargs = mirrored(self, block, names, args, kwargs)
            if block:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                self.streams = {name: given.get(name) for name in block.streams}
            args, kwargs = skipping.before(args, kwargs) if skipping else (args, kwargs)
            if block:
                self.count(block)
            return args, kwargs

        return before


class _Skip:
    """Takes units around a block: they leave it as they came."""

    def __init__(self, rows, block):
        self.rows, self.block = rows, block

    def before(self, args, kwargs):
        rows = self.rows
        self.stage, skipping = rows.present, rows.skips[self.block.layer]
        self.around = tuple(u for u in self.stage if rows.units[u].role in skipping)
        if not self.around:
            return args, kwargs
        # a block cannot run without rows
        self.inside = tuple(u for u in self.stage if u not in self.around) or self.stage[:1]
        self.kept = [self._take(stream, self.around) for stream in rows.streams.values()]
        rows.become(self.inside)
        args = tuple(self._take(value, self.inside) for value in args)
        return args, {name: self._take(value, self.inside) for name, value in kwargs.items()}

    def after(self, module, args, output):
        if not self.around:
            return output
        rows = self.rows
        rows.become(self.stage)
        outputs = [
            out if out is None else self._merge(out, kept)
            for out, kept in zip(output if isinstance(output, tuple) else (output,), self.kept, strict=True)
        ]
        self.kept = None
        return tuple(outputs) if isinstance(output, tuple) else outputs[0]

    def _take(self, value, units):
        rows = self.rows
        if isinstance(value, torch.Tensor):
            if twice(value, len(self.stage) * rows.size):
                return torch.cat([self._take(half, units) for half in value.chunk(2)])
            if not value.ndim or value.shape[0] != len(self.stage) * rows.size:
                return value
            return value.index_select(0, rows.index(self.stage, units, value.device))
        return _map(value, lambda v: self._take(v, units))

    def _merge(self, out, kept):
        rows = self.rows
        merged = out.new_empty(len(self.stage) * rows.size, *out.shape[1:])
        for part, units in ((out, self.inside), (kept, self.around)):
            merged.index_copy_(0, rows.index(self.stage, units, out.device), part.to(out.dtype))
        return merged


def twice(value, rows):
    """True for the batch at two noise levels, one after the other: of the picture and of its reference images."""
    return value.ndim > 0 and value.shape[0] == 2 * rows


def _map(value, function):
    if type(value) in (list, tuple):
        return type(value)(function(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: function(getattr(value, f.name)) for f in fields(value)})
    return value
