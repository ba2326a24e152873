"""Personalize Anything (Feng et al. 2025, arXiv 2503.12590): tokens of a subject in place of the picture's own early in
the run, and beside them later on.

The paper replaces the modulated hidden states that attention is asked with. Each token is projected and normalised by
itself, so that is the same as replacing its query, key and value before they get their places.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from math import floor, log

import torch
from torch.nn.functional import adaptive_avg_pool2d, pad

from ..shared.architectures import adapter_of, flux, self_attention_layers
from ..shared.attention import Attention, additive
from ..shared.conditioning import digest
from ..shared.mask import fit, grow
from ..shared.schedule import Schedule
from ..shared.source import covers, source_from
from ..shared.steering import STACK, Source, Term, blame, number, steer

ALL = {flux.name: "0%-100%"}  # as the official code
WINDOW = 3  # side of the windows in which tokens are shuffled (the paper's)
SIZES = ("own size", "fit the box")


@dataclass(frozen=True, eq=False)
class Layout:
    """Which token of the source stands for which of the picture.

    subject: mask of the source [b, h, w].  target: mask [b, h, w] of where it may go, or None for anywhere.
    box: (x, y, width, height) in shares of the picture to put the subject in the middle of; None for that of the
    target, or its own place.  fits: it is scaled to fit the box, its aspect kept.  cells: by which its mask grows.
    perturbation: share of the 3 x 3 windows that are shuffled.
    """

    subject: torch.Tensor
    target: torch.Tensor | None = None
    box: tuple | None = None
    fits: bool = False
    cells: int = 0
    perturbation: float = 0.0
    seed: int = 0

    def tokens(self, mask, shape, grid, cells=0):
        """True for the tokens [b, h, w] of which a mask has half or more."""
        mask = grow(fit(mask, shape).reshape(-1, 1, *shape[-2:]), cells)
        return adaptive_avg_pool2d(mask, grid)[:, 0] >= 0.5

    def on(self, shape, grid, level=None):
        """(index, there), each [b, h * w]: of the source's token for each of the picture, and whether it is taken.

        level: noise level that tells apart what is shuffled; None for what is not perturbed.  ValueError where the
        subject has no token, or no place.
        """
        subject = self.tokens(self.subject, shape, grid, self.cells)
        allowed = torch.ones_like(subject) if self.target is None else self.tokens(self.target, shape, grid)
        size = max(len(subject), len(allowed))
        masks = (mask.expand(size, -1, -1) for mask in (subject, allowed))
        maps = [self._map(*each) for each in zip(*masks, strict=True)]
        if level is not None and self.perturbation:
            maps = [self._perturbed(*each, (self.seed * 1000003 + round(level * 1e6)) % 2**63) for each in maps]
        index, there = (torch.stack([each[i] for each in maps]).flatten(1) for i in (0, 1))
        return index, there

    def columns(self, shape, grid):
        """Numbers of the source's tokens that are of the subject in any picture; [b, numbers], True where not in it."""
        mine = self.tokens(self.subject, shape, grid, self.cells).flatten(1)
        columns = mine.any(0).nonzero()[:, 0]
        return columns, ~mine[:, columns]

    def _map(self, subject, allowed):
        """(index [h, w], there [h, w], subject, and where a token of the source may stand) of one picture."""
        h, w = subject.shape
        if not subject.any():
            raise ValueError("the subject mask has no token of the picture; paint more of the subject, or grow it.")
        if not allowed.any():
            raise ValueError("the target mask has no token of the picture; paint more of it.")
        top, left, height, width = bounds(subject)
        y, x, down, across = bounds(subject if self.target is None else allowed)
        if self.box is not None:
            x, y, across, down = (share * side for share, side in zip(self.box, (w, h, w, h), strict=True))
        scale = min(down / height, across / width) if self.fits else 1.0
        tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
        y, x = floor(y + (down - tall + 1) / 2), floor(x + (across - wide + 1) / 2)
        rows = top + ((torch.arange(h) - y + 0.5) * height / tall).floor().long()
        columns = left + ((torch.arange(w) - x + 0.5) * width / wide).floor().long()
        inside = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w)) & allowed
        index = rows.clamp(0, h - 1)[:, None] * w + columns.clamp(0, w - 1)
        there = inside & subject.flatten()[index]
        if not there.any():
            raise ValueError("the subject comes to lie outside of the picture or the target mask; move its box.")
        return index, there, subject, inside

    def _perturbed(self, index, there, subject, inside, seed):
        """(index, there), shuffled, with an edge that is one token further out, further in, or where it was."""
        generator, (h, w) = torch.Generator().manual_seed(seed), subject.shape
        step = int(torch.randint(-1, 2, (), generator=generator))
        key = torch.rand(h * w, generator=generator, dtype=torch.float64)
        tall, wide = -(-h // WINDOW), -(-w // WINDOW)
        chosen = torch.rand(tall * wide, generator=generator) < self.perturbation
        window = ((torch.arange(h) // WINDOW)[:, None] * wide + torch.arange(w) // WINDOW).flatten()
        subject = grow(subject[None].float(), step)[0].flatten() > 0
        mine = subject.nonzero()[:, 0]
        order = torch.where(chosen[window[mine]], key[mine], mine.double() / (h * w))  # others stay as they were
        shuffled = torch.arange(h * w)
        shuffled[mine[torch.argsort(window[mine], stable=True)]] = mine[torch.argsort(window[mine] + order)]
        return shuffled[index], inside & subject[index]


def bounds(mask):
    """(top, left, height, width) of what is True in [h, w]."""
    rows, columns = (mask.any(dim).nonzero()[:, 0] for dim in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


@dataclass(frozen=True)
class Subject(Term):
    """What both stages have in common. order: of the node among those of its kind; where two meet the later counts."""

    order: int = 0
    source: Source = None
    layers: str = "auto"
    tells: str = ""  # layouts apart
    layout: Layout = field(default=None, compare=False, repr=False)
    node = "SteerPersonalizeAnything"
    edits = True

    @property
    def rank(self):
        return self.order

    def prepare(self, run):
        covers(self.source, run)
        side = run.model.get_model_object("diffusion_model").patch_size
        self.layout.on(run.shape, tuple(-(-n // side) for n in run.shape[-2:]))

    def branches(self, model):
        return (self.source,)

    def attention(self, model):
        if adapter_of(model.model) is not flux:
            raise ValueError(
                f"replaces tokens of transformers of the family {flux.name}, and this model is "
                f"{type(model.model).__name__}."
            )
        layers = self_attention_layers(model, self.layers, ALL)
        return (Attention("self", layers, self.edit, beside=(self.source,), unplaced=True),)

    def taken(self, source, target):
        """(q, k, v) of the source's image tokens before they get their places."""
        if not (source.unplaced and target.unplaced):
            raise ValueError(f"another node replaces the block {target.layer}, so that its queries are not known.")
        q, k, _ = source.unplaced
        return [t[:, slice(*source.image)].to(target.q) for t in (q, k, source.v)]

    def once(self, call, target, key, make):
        """`make`() on the device of `target`, made again only where `key` is another than before."""
        kept, key = call.run.state.setdefault(self, {}), (key, target.q.device)
        if key not in kept:
            kept.clear()
            kept[key] = [t.to(target.q.device) for t in make(call.run.shape, target.grid()[1:])]
        return kept[key]


@dataclass(frozen=True)
class Replace(Subject):
    """(q, k, v)_j = (R_j q_i, R_j k_i, v_i) for each token j of the picture that stands for the source's token i, where
    R_j is the rotation of its own place: tokens without their positions."""

    def edit(self, target, beside, attend, call, weight, role):
        with blame(self):
            taken = self.taken(*beside, target)
            level = call.level if self.layout.perturbation else None
            index, there = self.once(call, target, level, partial(self.layout.on, level=level))
        image = slice(*slice(*target.image).indices(target.q.shape[1]))
        pe, there = target.unplaced[2][:, :, image], there[..., None]
        index = index[..., None].expand(len(target.q), -1, target.q.shape[2])
        taken = [t.gather(1, index) for t in taken]
        taken[:2] = (placed(t, pe, target.heads) for t in taken[:2])
        changed = {}
        for name, new in zip("qkv", taken, strict=True):
            old = getattr(target, name)
            mixed = torch.where(there, new, old[:, image])
            changed[name] = torch.cat((old[:, : image.start], mixed, old[:, image.stop :]), 1)
        return attend(replace(target, **changed))


@dataclass(frozen=True)
class Append(Subject):
    """softmax([Q, q_s] [K, k_s]^T) [V, v_s] without the rows of q_s: the subject's tokens beside text and picture, at
    position 0, which turns nothing. strength: what attention to them is multiplied by before the softmax."""

    strength: float = 1.0

    def check(self):
        number("strength", self.strength, 0.0, 10.0)

    @property
    def off(self):
        return super().off or self.strength == 0.0

    def edit(self, target, beside, attend, call, weight, role):
        with blame(self):
            new = self.taken(*beside, target)
            columns, outside = self.once(call, target, None, self.layout.columns)
        n, count = target.q.shape[1], len(columns)
        q, k, v = (torch.cat((t, s[:, columns]), 1) for t, s in zip((target.q, target.k, target.v), new, strict=True))
        bias = q.new_zeros(len(outside), 1, 1, n + count)
        bias[..., n:] = log(self.strength)
        bias[..., n:].masked_fill_(outside[:, None, None], float("-inf"))
        if target.mask is not None:
            mask = additive(target.mask, q.dtype)
            bias = bias + pad(mask, (0, count, 0, count if mask.shape[-2] > 1 else 0))
        first, last, _ = slice(*target.image).indices(n)
        longer = replace(target, q=q, k=k, v=v, mask=bias, image=(first, last))
        return attend(longer)[:, :n]


def placed(x, pe, heads):
    """x [b, n, heads * d] with the rotations pe [b or 1, 1, n, d / 2, 2, 2] of its places, as the host does it."""
    from comfy.ldm.flux.math import apply_rope1

    return apply_rope1(x.unflatten(2, (heads, -1)).transpose(1, 2), pe).transpose(1, 2).flatten(2)


def apply(model, trajectory, mask, threshold, strength, schedule, layers="auto", box=None, size=SIZES[0], target=None,
          perturbation=0.0, cells=0, seed=0, source=None):
    """A clone of `model` that takes the subject of `trajectory`, where `mask` [b, h, w] is, until `threshold` of the
    sampling range; after that it is only looked at, with `strength`.  See `Layout` for the rest."""
    with blame(Subject):
        number("threshold", threshold, 0.0, 1.0)
        number("perturbation", perturbation, 0.0, 1.0)
        if box is not None and (min(box[2:]) <= 0 or min(box) < 0 or max(box) > 1):
            raise ValueError(f"the box x, y, width, height {box} must lie between 0 and 1; width and height above 0.")
        branch = source_from(model, trajectory, source)
    layout = Layout(mask, target, box, size == SIZES[1], cells, perturbation, seed)
    order = sum(isinstance(term, Subject) for term in model.model_options.get(STACK, ()))
    first, last = schedule.start_percent, schedule.end_percent
    own = order, branch, layers, f"{digest([mask, target])} {box} {size} {cells} {perturbation} {seed}", layout
    model = steer(model, Replace(Schedule(first, max(first, min(threshold, last))), *own))
    return steer(model, Append(Schedule(min(last, max(threshold, first)), last), *own, strength))
