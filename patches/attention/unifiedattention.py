"""Unified attention control of InfEdit (Xu et al. 2023, arXiv 2312.04965, section 4) without inversion: the source is
what FlowEdit's sampler shows the network of the picture, at the same noise."""

import uuid
from dataclasses import dataclass, field

import torch

from ..inversion.flowedit import FlowEdit
from ..shared.alignment import align
from ..shared.architectures import flux, hunyuan, lumina, qwen, sd3, self_attention_layers, unet, wan
from ..shared.attention import Attention, image_from
from ..shared.conditioning import digest
from ..shared.schedule import Schedule
from ..shared.steering import Source, Term, blame, number, steer
from ..shared.words import encode
from .prompttoprompt import CrossReplace, LocalBlend, blending, same_text, weighed

ALL = dict.fromkeys((a.name for a in (unet, flux, sd3, lumina, qwen, wan, hunyuan)), "0%-100%")


def _conds(guider):
    return [{**c, "model_conds": dict(c["model_conds"]), "uuid": uuid.uuid4()} for c in guider.conds["source"]]


LIVE = Source("FlowEdit", None, _conds)  # the source of the run's own sampler


def live(run):
    """ValueError where the run's sampler does not show a source at every step."""
    if not isinstance(run.sampler, FlowEdit):
        raise ValueError(
            "needs the guider and the sampler of SteerFlowEdit, which show the network the source at each step; wire "
            "this model to SteerFlowEdit."
        )
    if run.sampler.n_min:
        raise ValueError(
            f"n_min {run.sampler.n_min} draws the last steps without a source; set n_min of SteerFlowEdit to 0."
        )


@dataclass(frozen=True)
class Control(Term):
    """What both parts of self-attention have in common. `own`: the share of the target's own attention."""

    own: float = 0.0
    layers: str = "auto"
    name = "eta"
    takes = "qk"  # from the source
    node = "SteerUnifiedAttention"
    edits = True
    exclusive = True

    def check(self):
        number(self.name, self.own, 0.0, 1.0)

    @property
    def off(self):
        return super().off or self.own == 1.0

    def prepare(self, run):
        live(run)

    def branches(self, model):
        return (LIVE,)

    def attention(self, model):
        sets = tuple({"q": "queries", "k": "keys", "v": "values"}[name] for name in self.takes)
        return (Attention("self", self_attention_layers(model, self.layers, ALL), self.edit, sets, (LIVE,)),)

    def edit(self, target, beside, attend, call, weight, role):
        other = attend(image_from(*beside, target, self.takes))  # words may be edited in both
        return other if self.own == 0.0 else torch.lerp(other, attend(target), self.own)


@dataclass(frozen=True)
class Modulation(Control):
    """(eta P_t + (1 - eta) P_s) V_t: places attend to each other as in the source, so its layout stays. Rigid edits."""


@dataclass(frozen=True)
class Merging(Control):
    """gamma P_t V_t + (1 - gamma) softmax(Q_t K_s) V_s: its own layout, filled from the source. Non-rigid edits."""

    name = "gamma"
    takes = "kv"


@dataclass(frozen=True)
class Shown:
    """Knows the words of both prompts, and the source from the run's sampler."""

    before: list = field(default=None, compare=False, repr=False)  # CONDITIONING of the source

    def prepare(self, run):
        live(run)
        same_text(run, "source", self.before)
        same_text(run, "positive", self.positive)


@dataclass(frozen=True)
class CrossControl(Shown, CrossReplace):
    """The map from places to words as Prompt-to-Prompt edits it, from the source that the sampler shows."""

    node = Control.node


@dataclass(frozen=True)
class Blend(Shown, LocalBlend):
    """Where nobody attends to the words the estimate of the sampler is the picture: there it ends as it was."""

    node = Control.node


def prompts(clip, source_prompt, prompt, operation="refine"):
    """CONDITIONING of both and their `Alignment`."""
    (source, before), (positive, after) = encode(clip, source_prompt), encode(clip, prompt)
    with blame(Control):
        return source, positive, align(before, after, operation)


def apply(model, self_replace, eta, gamma, layers, schedule, cross_replace=0.0, texts=None, weights="",
          source_weights="", blend_words="", blend_threshold=0.6):
    """texts: of `prompts`, for what is said of words; of a batch one alignment for all of its pictures, or for each."""
    with blame(Control):
        number("self_replace", self_replace, 0.0, 1.0)
        number("cross_replace", cross_replace, 0.0, 1.0)
    start, end = schedule.start_percent, schedule.end_percent
    turn, last = (start + share * (end - start) for share in (self_replace, cross_replace))
    model = steer(model, Modulation(Schedule(start, turn), eta, layers))
    model = steer(model, Merging(Schedule(turn, end), gamma, layers))
    if texts is None:
        return model
    source, positive, *alignments = texts
    with blame(Control):
        tensors = weighed(alignments, weights, source_weights, cross_replace > 0.0)
    words = Schedule(start, last), LIVE, layers, digest(tensors), positive
    model = steer(model, CrossControl(*words, *tensors, before=source))
    both = dict(positive=positive, before=source)
    return blending(model, Blend, LIVE, layers, alignments, blend_words, blend_threshold, **both)
