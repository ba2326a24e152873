"""Tokens of a reference as a second cross-attention beside the text's (IP-Adapter, arXiv 2308.06721, equation 5)."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .architectures import unet
from .attention import Attention, plain
from .mask import fit, on_tokens
from .steering import Term, Text, blame, number

ORDER = ("input", "output", "middle")  # in which files number the layers
UNCONDITIONAL = ("negative", "empty_negative_prompt")  # roles of conditionings without a reference


def check_node(adapter, node):
    """Raises ValueError unless the node of this id takes the adapter."""
    if node not in adapter.nodes:
        raise ValueError(f"{adapter.name} is {adapter.kind}; use {' or '.join(adapter.nodes)} for it.")


def in_file_order(network):
    """The cross-attentions of a UNet as `unet.cross_attentions` has them, in the order of adapter files."""
    return sorted(unet.cross_attentions(network), key=lambda each: ORDER.index(each[0].group))


def places(model, adapter):
    """[(Layer, number of the transformer in it)] for each layer of the adapter's file, in a UNet ModelPatcher.

    ValueError where the adapter is made for another network.
    """
    network = model.get_model_object("diffusion_model")
    if not unet.matches(network):
        raise ValueError(
            f"{adapter.name} acts on the cross-attention of a UNet (SD1.x, SD2.x, SDXL), which "
            f"{type(model.model).__name__} does not have."
        )
    found = in_file_order(network)
    here = tuple(attention.to_q.out_features for *_, attention in found)
    text = sorted({attention.to_k.in_features for *_, attention in found})
    if here != adapter.hidden or text != [adapter.width]:
        sizes = ", of other sizes" if len(here) == len(adapter.hidden) and here != adapter.hidden else ""
        raise ValueError(
            f"{adapter.name} is made for a UNet with {len(adapter.hidden)} cross-attentions to a text of width "
            f"{adapter.width}{adapter.made_for}; this model has {len(here)} to a text of width "
            f"{', '.join(map(str, text))}{sizes}. Take the adapter that is made for it."
        )
    return [(layer, depth) for layer, depth, _ in found]


@dataclass(frozen=True)
class Reference(Term):
    """A(q, K, V) + s w_l M A(q, W_k e, W_v e) in place of A(q, K, V), in every cross-attention l of a UNet.

    tokens: e where the picture's own text is, [1 or B, T, width]; one per item of the batch, or one for all.
    unconditional: e where the negative is; None adds nothing there.
    weights: w_l of each Layer, in the order of the forward.  mask: M, [1 or B, h, w] on the picture, or None.

    W_k e and W_v e are made when the run begins, before the model is loaded, and die with the run.
    """

    adapter: Any = None
    strength: float = 1.0
    weights: tuple = ()
    content: str = ""  # digest of tokens and mask
    tokens: torch.Tensor = field(default=None, compare=False, repr=False)
    unconditional: torch.Tensor = field(default=None, compare=False, repr=False)
    mask: torch.Tensor = field(default=None, compare=False, repr=False)

    edits = True

    def check(self):
        number("strength", self.strength)

    @property
    def off(self):
        empty = self.mask is not None and not bool(self.mask.any())
        return super().off or self.strength == 0.0 or empty or not any(w for _, w in self.weights)

    def places(self, model):
        """[(Layer, depth)] for each layer of the adapter's file; ValueError where it is made for another network."""
        return places(model, self.adapter)

    def projected(self, run):
        return Projected(self, run)

    def answer(self, call, out):
        """What the queries of `call` get from the reference whose keys and values are its own, beside `out`."""
        return plain(call)

    def attention(self, model):
        self.places(model)
        layers = tuple(layer for layer, w in self.weights if w)
        return (Attention("cross", layers, self.edit, negative=self.unconditional is not None),)

    def prepare(self, run):
        items = [len(t) for t in (self.tokens, self.unconditional) if t is not None and len(t) != 1]
        if any(n != run.size for n in items):
            raise ValueError(f"there are references for {items[0]} pictures, and the batch has {run.size}.")
        if self.mask is not None:
            fit(self.mask, run.shape)
            if any(c.get("area") or c.get("set_area_to_bounds") for cs in run.guider.conds.values() for c in cs):
                raise ValueError("mask is for the whole picture, and a conditioning has an area; take off one of them.")
        run.state[self] = self.projected(run)

    def edit(self, target, beside, attend, call, weight, role):
        out, projected = attend(target), call.run.state[self]
        with blame(self):
            return projected.add(out, target, role, self.strength * weight)


class Projected:
    """What a `Reference` needs in one run: keys and values of each layer, and the mask."""

    def __init__(self, term, run):
        self.size, self.mask, self.weights, self.answer = run.size, None, dict(term.weights), term.answer
        self.items = range(run.size)  # of the batch, where anything is added
        if term.mask is not None:
            mask = fit(term.mask, run.shape)
            self.mask = mask.expand(run.size, *mask.shape[1:])
            self.items = [n for n, each in enumerate(self.mask) if bool(each.any())]
        given = {"positive": term.tokens}
        if term.unconditional is not None:
            given["negative"] = term.unconditional
        at = term.places(run.model)
        numbers = [n for n, (layer, _) in enumerate(at) if self.weights.get(layer)]
        made = term.adapter.keys_and_values(given.values(), numbers)
        self.made = {(*at[n], name): kv for n in numbers for name, kv in zip(given, made[n], strict=True)}
        self.fitted = {}

    def add(self, out, target, role, strength):
        """`out` [b, N, heads * d], and what the queries of the AttnCall `target` get from the reference."""
        if role == "other":
            raise ValueError(
                "cannot tell the positive from the negative: another node (context windows) runs the conditionings in "
                "parts; take it off."
            )
        name = "negative" if isinstance(role, Text) or role in UNCONDITIONAL else "positive"
        key = target.layer, target.depth, name, target.q.shape, target.shape, target.q.device, target.q.dtype
        if key not in self.fitted:
            self.fitted[key] = self._fit(target, self.pair(target, name))
        k, v, m, rows = self.fitted[key]
        asking, its = target, out
        if rows is not None:
            raw = {name: t[rows] for name, t in target.raw.items()}
            asking, its = replace(target, q=target.q[rows], raw=raw), out[rows]
        seen = self.answer(replace(asking, k=k, v=v, mask=None), its)
        seen = seen if m is None else seen * m
        share = strength * self.weights[target.layer]
        return torch.add(out, seen, alpha=share) if rows is None else out.index_add(0, rows, seen, alpha=share)

    def pair(self, target, name):
        """(k, v), each [1 or B, T, width], for the layer of the AttnCall `target`; name: "positive" or "negative"."""
        return self.made[target.layer, target.depth, name]

    def _fit(self, target, kv):
        """(k, v, mask or None, rows or None), each for the rows of `target` whose item has a reference."""
        count, like = len(target.q), target.q
        if count % self.size:
            raise ValueError(f"{count} rows of {target.layer} are not {self.size} pictures; another node changed them.")
        rows = [n for n in range(count) if n % self.size in self.items]
        items = torch.tensor([n % self.size for n in rows])

        def of_rows(t):
            items_of = items.to(t.device) if len(t) > 1 else torch.zeros_like(items).to(t.device)
            return t[items_of].to(like)

        m = None
        if self.mask is not None:
            m = of_rows(on_tokens(self.mask, target.rows(0, self.size))[..., None])
            text = target.q.shape[1] - m.shape[1]  # tokens before the image, which stand for all of it
            m = torch.cat((m.mean(1, keepdim=True).expand(-1, text, -1), m), 1) if text else m
        chosen = None if len(rows) == count else torch.tensor(rows, device=like.device)
        return *(of_rows(t) for t in kv), m, chosen
