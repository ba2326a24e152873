"""Regions: words of a prompt that count in a part of the picture alone, so that no subject gets what another is said to
have.

The attention of each place to each word is weighed before the softmax, as regional prompting does with hard cuts
(Mix-of-Show, Gu et al. 2023, arXiv 2305.18292, section 3.3); where text and image share one attention, the word's view
of the picture and of other words too.
"""

from dataclasses import dataclass, field, replace

import torch

from ..shared.architectures import flux, hunyuan, lumina, one_attention, qwen, sd3, self_attention_layers, unet, wan
from ..shared.attention import Attention, additive
from ..shared.conditioning import digest
from ..shared.mask import fit, on_tokens
from ..shared.steering import Term, blame, number, steer
from ..shared.textattention import on_keys, span
from ..shared.words import encode

ISOLATE = ("auto", "on", "off")
ALL = dict.fromkeys((a.name for a in (unet, flux, sd3, lumina, qwen, wan, hunyuan)), "0%-100%")


@dataclass(frozen=True)
class Regions(Term):
    """softmax(q k^T + log(1 - s c)) v, s the strength times the schedule's weight, where c, between a place p of the
    picture and a word w, or between two of a kind, is 1 for what must not see each other:

        c(p, w)  = 1 - max_r w_r m_r(p)                    0 for a word that no region owns
        c(w, w') = 1 - max_r w_r w'_r                      0 where one of them is owned by none
        c(p, p') = min(u(p), u(p')) - max_r min(m_r(p), m_r(p')),  u = max_r m_r       where `isolate` says so

    m_r: the mask of region r on the tokens;  w_r: 1 for the columns of its words.  Rows under the positive alone.
    isolate: "on", "off", or "auto", on where text and image share one attention.
    """

    strength: float = 1.0
    isolate: str = "auto"
    layers: str = "auto"
    tells: str = ""  # regions apart
    masks: tuple = field(default=(), compare=False, repr=False)  # of each region, [b, h, w]
    owners: torch.Tensor = field(default=None, compare=False, repr=False)  # w_r, [regions, columns of the prompt]
    positive: list = field(default=None, compare=False, repr=False)  # CONDITIONING whose columns these are
    node = "SteerRegions"
    edits = True

    def check(self):
        number("strength", self.strength, 0.0, 1.0)
        if self.isolate not in ISOLATE:
            raise ValueError(f'isolate "{self.isolate}" must be one of {", ".join(ISOLATE)}.')

    @property
    def off(self):
        return super().off or self.strength == 0.0

    def prepare(self, run):
        for mask in self.masks:
            fit(mask, run.shape)
        mine = [context for context, _ in self.positive]
        for cond in run.guider.original_conds["positive"]:
            given = cond.get("cross_attn")
            if given is None or not any(given.shape == c.shape and torch.equal(given.to(c), c) for c in mine):
                raise ValueError(
                    "the guider's positive is not the prompt whose words have regions; wire the positive output of "
                    "this node to it."
                )

    def attention(self, model):
        layers = self_attention_layers(model, self.layers, ALL)
        kinds = ("cross", "self") if self.isolate == "on" and not one_attention(model) else ("cross",)
        return tuple(Attention(kind, layers, self.edit, negative=False) for kind in kinds)

    def edit(self, target, beside, attend, call, weight, role):
        kept = call.run.state.setdefault(self, {})
        key = target.kind, target.places, target.k.shape[1], target.q.device, target.q.dtype, weight
        with blame(self):
            if target.shape[2:] != call.run.shape[2:]:
                raise ValueError(
                    "masks are for the whole picture, and a conditioning has an area; take off one of them."
                )
            if key not in kept:
                cut = self.cut(target, self.on(target, call.run.shape))
                kept[key] = torch.log1p(-self.strength * weight * cut).to(target.q.dtype)[:, None]
        bias = kept[key]
        return attend(replace(target, mask=bias if target.mask is None else bias + additive(target.mask, bias.dtype)))

    def on(self, target, shape):
        """m_r [b, regions, places]."""
        each = [on_tokens(fit(mask, shape), target) for mask in self.masks]
        size = max(map(len, each))
        return torch.stack([m.expand(size, -1) for m in each], 1)

    def cut(self, target, m):
        """c [b, queries, keys]."""
        if target.kind == "self":
            return apart(m)
        w = on_keys(self.owners.to(m), target)
        owned = w.amax(0)
        picture = owned - torch.stack([w[r] * m[:, r, :, None] for r in range(len(w))]).amax(0)  # [b, places, words]
        if target.kind == "cross":
            return picture
        first, last = span(target)
        image = slice(*slice(*target.image).indices(target.k.shape[1]))
        c = m.new_zeros(len(m), target.q.shape[1], target.k.shape[1])
        c[:, image, first:last] = picture
        c[:, first:last, image] = picture.mT
        c[:, first:last, first:last] = owned * owned[:, None] - (w[:, :, None] * w[:, None]).amax(0)
        if self.isolate != "off":
            c[:, image, image] = apart(m)
        return c


def apart(m):
    """c(p, p') [b, places, places] of m_r [b, regions, places]: places of the picture that are in no common region."""
    u = m.amax(1)
    c = torch.minimum(u[:, :, None], u[:, None])
    return c - torch.stack([torch.minimum(each[:, :, None], each[:, None]) for each in m.unbind(1)]).amax(0)


def owners(prompt, regions):
    """w_r [regions, columns] of the phrases of each region, one a line, in a `Prompt`."""
    w = torch.zeros(len(regions), prompt.columns)
    for r, phrases in enumerate(regions):
        for phrase in filter(str.strip, phrases.splitlines()):
            for stream, places in zip(prompt.streams, prompt.places(phrase), strict=True):
                w[r, [c for place in places for i in place for c in stream.words[i][1]]] = 1.0
    return w


def apply(model, clip, text, regions, strength, isolate, layers, schedule, positive=None):
    """(model, CONDITIONING): words of `text` in their regions.

    regions: [(phrases of the prompt, one a line; MASK [b, h, w] or None)]; those without words do not count.
    positive: a CONDITIONING of this text to which something has been done since; without it, it is encoded here.
    """
    with blame(Regions):
        encoded, prompt = encode(clip, text)
        positive = encoded if positive is None else positive
        for n, (phrases, mask) in enumerate(regions, 1):
            if bool(phrases.strip()) != (mask is not None):
                there, missing = ("mask", "words") if mask is not None else ("words", "mask")
                raise ValueError(f"{there}_{n} is given and {missing}_{n} is not; give both or none.")
        regions = [each for each in regions if each[1] is not None]
        if not regions:
            raise ValueError("there is no region; give words_1 and mask_1.")
        w = owners(prompt, [phrases for phrases, _ in regions])
        if any(context.shape[1] != prompt.columns for context, _ in positive):
            raise ValueError("positive is not of this text: it has another number of columns; wire the text's own.")
        masks = tuple(mask for _, mask in regions)
    term = Regions(schedule, strength, isolate, layers, digest([w, *masks]), masks, w, positive)
    return steer(model, term), positive
