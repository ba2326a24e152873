"""Prompt-to-Prompt (Hertz et al. 2022, arXiv 2208.01626): the attention of a source picture under another prompt.

The paper's maps are never made: what it does to them is linear in the values, so it is attention with other values.
"""

from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch.nn.functional import interpolate, max_pool2d, pad

from ..shared.alignment import align
from ..shared.architectures import self_attention_layers
from ..shared.attention import Attention, image_from, plain
from ..shared.conditioning import digest
from ..shared.guider import Guider
from ..shared.schedule import Schedule
from ..shared.source import covers, source_from
from ..shared.steering import RUN, Source, Term, blame, number, steer
from ..shared.textattention import around, asking, attention_to, on_keys, span, to_text, valued
from ..shared.words import encode, listed
from .wordmask import ALL, Maps

KEY = "steer.prompttoprompt"
TINY = 1e-6


@dataclass(frozen=True)
class Edit(Term):
    """What the parts of the method have in common; only rows under the positive text are edited."""

    source: Source = None
    layers: str = "auto"
    words: str = ""  # tells edits apart
    positive: list = field(default=None, compare=False, repr=False)  # CONDITIONING whose columns it knows, if any
    node = "SteerPromptToPrompt"
    edits = True
    exclusive = True

    def prepare(self, run):
        covers(self.source, run)
        if self.positive is not None:
            same_text(run, "positive", self.positive)

    def branches(self, model):
        return (self.source,)

    def on(self, model, kind, edit, sets=()):
        layers = self_attention_layers(model, self.layers, ALL)
        return (Attention(kind, layers, edit, sets, (self.source,), negative=False),)


@dataclass(frozen=True)
class SelfReplace(Edit):
    """SDPA(q_s, k_s, v_t): places of the target attend to each other as the source's do. "auto" leaves out layers with
    more than a quarter of the latent's places, as the official code does."""

    def attention(self, model):
        return self.on(model, "self", self.edit, ("queries", "keys"))

    def edit(self, target, beside, attend, call, weight, role):
        large = self.layers.strip() == "auto" and 4 * target.places > prod(target.shape[2:])
        return attend(target if large else image_from(*beside, target, "qk"))


@dataclass(frozen=True)
class CrossReplace(Edit):
    """a (c alpha A_s c_s M + c (1 - alpha) A_t) + (1 - a) A_t in place of the map A_t from places to words, times v:

        SDPA(q_s, k_s, c_s M (w_s v)) + SDPA(q_t, k_t, w_t v),  w_s = a c alpha,  w_t = a c (1 - alpha) + 1 - a

    M, alpha: as in `Alignment`, [b, source columns, target columns] and [b, target columns].
    c, c_s: weights of the target's and the source's columns.  a: the schedule's weight, less `own`, the share that the
    target's own map keeps (a style put in: (1 - own) A_s + own A_t).
    Rows are not normalised again, as in the official code. Where text and image share one attention, only the image
    asks, and A_s is the softmax over the source's text alone; it shares out what of its attention the target has for
    words with a counterpart, and nothing else changes. Edits of self-attention come before it there: what it has for
    words is what they leave it.
    """

    M: torch.Tensor = field(default=None, compare=False, repr=False)
    alpha: torch.Tensor = field(default=None, compare=False, repr=False)
    c: torch.Tensor = field(default=None, compare=False, repr=False)
    c_s: torch.Tensor = field(default=None, compare=False, repr=False)
    own: float = 0.0

    def check(self):
        number("alpha", self.own, 0.0, 1.0)

    @property
    def off(self):
        return super().off or self.own == 1.0

    def attention(self, model):
        return self.on(model, "cross", self.edit, ("map",))

    def edit(self, target, beside, attend, call, weight, role):
        (source,), text, weight = beside, to_text(target), weight * (1 - self.own)
        M, alpha, c, c_s = (t.to(text.v) for t in (self.M, self.alpha, self.c, self.c_s))
        w_s, w_t = weight * c * alpha, weight * c * (1 - alpha) + (1 - weight)
        with blame(self):
            its = to_text(source)
            words = text.v[:, : alpha.shape[1]]  # the first time, where they are repeated
            theirs = plain(replace(its, v=on_keys(c_s[..., None] * (M @ (w_s[..., None] * words)), its, 1)))
            w_t = 1 + everywhere(target, on_keys(w_t - 1, text))
            mapped = everywhere(target, on_keys(weight * alpha, text))
            p = plain(valued(its, on_keys((M @ (weight * alpha)[..., None])[..., 0], its))).float()
        out = attend(replace(target, v=target.v * w_t[..., None]))
        if target.kind == "cross":
            return out + theirs
        image, others = slice(*target.image), around(target)
        mass = plain(valued(asking(target, image), mapped)).float()
        out[:, image] += (theirs * (mass / p.clamp(min=TINY))).to(out)
        out[:, others] += plain(asking(replace(target, v=target.v * (1 - w_t)[..., None]), others))  # as it was
        return out


def same_text(run, name, mine):
    """ValueError where the guider's texts `name` are not the CONDITIONING `mine`, whose columns are known."""
    mine = mine[0][0]
    for cond in run.guider.original_conds[name]:
        given = cond.get("cross_attn")
        if given is None or given.shape != mine.shape or not torch.equal(given.to(mine), mine):
            prompt = {"positive": "edited", "source": "source's"}[name]
            raise ValueError(
                f"the guider's {name} is not the {prompt} prompt; wire the {name} output of this node to it, so that "
                "words are found where they are."
            )


def everywhere(call, on_text):
    """[b or 1, keys]: `on_text` [b or 1, text keys] at the text, 0 at other keys."""
    first, last = span(call)
    return pad(on_text, (first, call.k.shape[1] - last))


@dataclass(frozen=True)
class LocalBlend(Edit):
    """Where neither the source's words nor the target's have attention, the latent is put back on the source's path.

    The attention is summed over the steps so far, its largest value within 3 x 3 places taken, and divided by the
    largest of the picture; the mask is where it is above `threshold`, in one of the two pictures.
    """

    threshold: float = 0.3
    window: Schedule = Schedule()
    columns: torch.Tensor = field(default=None, compare=False, repr=False)  # [1, target columns]
    source_columns: torch.Tensor = field(default=None, compare=False, repr=False)

    def check(self):
        number("blend_threshold", self.threshold, 0.0, 1.0)

    def attention(self, model):
        return self.on(model, "cross", self.look)

    def look(self, target, beside, attend, call, weight, role):
        if role == "positive":
            maps = call.run.state.setdefault(self, (Maps(), Maps()))
            with blame(self):
                for seen, at, columns in zip(maps, (target, *beside), (self.columns, self.source_columns), strict=True):
                    seen.add(target.grid(), attention_to(at, columns))
        return attend(target)

    def mask(self, run):
        """[B, 1, (1,) H, W] from what was seen so far."""
        masks = []
        for seen in run.state[self]:
            m = max_pool2d(seen.mean(run.shape, self.layers.strip() == "auto")[:, None], 3, 1, 1)
            m = interpolate(m, run.shape[-2:])
            masks.append(m / m.amax((2, 3), keepdim=True).clamp(min=TINY) > self.threshold)
        either = masks[0] | masks[1]
        return (either if len(run.shape) == 4 else either[:, :, None]).float()

    def put(self, run, z, its):
        """z [B, C, (T,) H, W], outside the mask of by now `its`."""
        if self not in run.state:  # nothing was seen yet
            return z
        m = self.mask(run).to(z)
        return m * z + (1 - m) * its.to(z)

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs):
        run = extra_args["model_options"]["transformer_options"][RUN]
        window, path = self.window.resolve(run.sampling), self.source.trajectory
        z_0 = latent_image if path is None else path.source

        def predict(x, sigma, **options):
            level = float(sigma.max())
            if not window.weight(level):
                return guider(x, sigma, **options)
            its = run.beside.z if path is None else path.at(level)
            return self.put(run, guider(self.put(run, x, its), sigma, **options), z_0)

        def predict_source(x, sigma, **options):
            """Of the sampler that takes it from the above: outside the mask both are the picture."""
            D = guider.predict_source(x, sigma, **options)
            return self.put(run, D, z_0) if window.weight(float(sigma.max())) else D

        guider_of_ours = Guider(guider, predict, {} if path else {"predict_source": predict_source})
        return executor(guider_of_ours, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)


def blended(alignment, words):
    """Weights of the target's and of the source's columns, 1 for `words` that either prompt has."""
    target, source = torch.zeros(alignment.target.columns), torch.zeros(alignment.source.columns)
    for name in listed(words):
        in_source = all(alignment.source.search(name)) and not name.startswith("#")  # a number is the target's
        if in_source:
            source[list(alignment.source.find(name))] = 1.0
        if not in_source or all(alignment.target.search(name)):
            target[list(alignment.target.find(name))] = 1.0
    return target, source


def stacked(items):
    """[(a, b, ...)] of the items of a batch as [a, b, ...] of all."""
    return [torch.stack(each) for each in zip(*items, strict=True)]


def weighed(alignments, weights, source_weights, acts):
    """M, alpha, c, c_s of `CrossReplace`; ValueError for weights where it never acts."""
    if not acts and (listed(weights) or listed(source_weights)):
        raise ValueError(
            "weights count while attention to words is the source's; raise cross_replace above 0 (and take alpha below "
            "1), or leave the weights empty."
        )
    return stacked((a.M, a.alpha, a.target.weights(weights), a.source.weights(source_weights)) for a in alignments)


def blending(model, kind, branch, layers, alignments, words, threshold, start=0.2, **texts):
    """A clone of `model` with a `LocalBlend`, or another of its kind, around `words`; `model` where there are none."""
    from comfy.patcher_extension import WrappersMP

    if not listed(words):
        return model
    with blame(kind):
        columns = stacked(blended(a, words) for a in alignments)
    seen = dict(zip(("columns", "source_columns"), columns, strict=True))
    window, tells = Schedule(start, 1.0), digest(columns)
    blend = kind(Schedule(), branch, layers, tells, threshold=threshold, window=window, **seen, **texts)
    model = steer(model, blend)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, blend.sampler_sample)
    return model


def edit(model, trajectory, source, positive, alignments, weights="", source_weights="", cross_replace=0.8,
         self_replace=0.4, blend_words="", blend_threshold=0.3, blend_start=0.2, layers="auto", alpha=0.0):
    """A clone of `model` that edits from the CONDITIONING `source` to `positive`. alignments: of all pictures of the
    batch, or one for each.  alpha: share of attention to words that stays the picture's own."""
    with blame(Edit):
        for name, value in (("cross_replace", cross_replace), ("self_replace", self_replace)):
            number(name, value, 0.0, 1.0)
        branch = source_from(model, trajectory, source)
        tensors = weighed(alignments, weights, source_weights, cross_replace > 0.0 and alpha != 1.0)
    model = steer(model, SelfReplace(Schedule(0.0, self_replace), branch, layers))
    cross = Schedule(0.0, cross_replace)
    model = steer(model, CrossReplace(cross, branch, layers, digest(tensors), positive, *tensors, alpha))
    return blending(
        model, LocalBlend, branch, layers, alignments, blend_words, blend_threshold, blend_start, positive=positive
    )


def apply(model, clip, trajectory, source_prompt, prompt, operation="refine", word_map="", **options):
    """(model, CONDITIONING of `prompt`, the alignment as text); see `edit` and `alignment.align`."""
    (source, before), (positive, after) = encode(clip, source_prompt), encode(clip, prompt)
    with blame(Edit):
        alignment = align(before, after, operation, word_map)
    return edit(model, trajectory, source, positive, [alignment], **options), positive, str(alignment)
