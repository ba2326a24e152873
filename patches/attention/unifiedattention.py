"""Unified attention control of InfEdit (Xu et al. 2023, arXiv 2312.04965, section 4) without inversion: the source is
what FlowEdit's sampler shows the network of the picture, at the same noise."""

import uuid
from dataclasses import dataclass

import torch

from ..inversion.flowedit import FlowEdit
from ..shared.architectures import flux, hunyuan, lumina, qwen, sd3, self_attention_layers, unet, wan
from ..shared.attention import Attention, image_from, plain
from ..shared.schedule import Schedule
from ..shared.steering import Source, Term, blame, number, steer

ALL = dict.fromkeys((a.name for a in (unet, flux, sd3, lumina, qwen, wan, hunyuan)), "0%-100%")


def _conds(guider):
    return [{**c, "model_conds": dict(c["model_conds"]), "uuid": uuid.uuid4()} for c in guider.conds["source"]]


LIVE = Source("FlowEdit", None, _conds)  # the source of the run's own sampler


@dataclass(frozen=True)
class Control(Term):
    """What both parts have in common. `own`: the share of the target's own attention."""

    own: float = 0.0
    layers: str = "auto"
    name = "eta"
    node = "SteerUnifiedAttention"
    edits = True
    exclusive = True

    def check(self):
        number(self.name, self.own, 0.0, 1.0)

    @property
    def off(self):
        return super().off or self.own == 1.0

    def prepare(self, run):
        if not isinstance(run.sampler, FlowEdit):
            raise ValueError(
                "needs the guider and the sampler of SteerFlowEdit, which show the network the source at each step; "
                "wire this model to SteerFlowEdit."
            )
        if run.sampler.n_min:
            raise ValueError(
                f"n_min {run.sampler.n_min} draws the last steps without a source; set n_min of SteerFlowEdit to 0."
            )

    def branches(self, model):
        return (LIVE,)

    def on(self, model, sets):
        layers = self_attention_layers(model, self.layers, ALL)
        return (Attention("self", layers, self.edit, sets, (LIVE,)),)


@dataclass(frozen=True)
class Modulation(Control):
    """(eta P_t + (1 - eta) P_s) V_t: places attend to each other as in the source, so its layout stays. Rigid edits."""

    def attention(self, model):
        return self.on(model, ("queries", "keys"))

    def edit(self, target, beside, attend, call, weight, role):
        return mixed(target, image_from(*beside, target, "qk"), attend, self.own)


@dataclass(frozen=True)
class Merging(Control):
    """gamma P_t V_t + (1 - gamma) softmax(Q_t K_s) V_s: its own layout, filled from the source. Non-rigid edits."""

    name = "gamma"

    def attention(self, model):
        return self.on(model, ("keys", "values"))

    def edit(self, target, beside, attend, call, weight, role):
        return mixed(target, image_from(*beside, target, "kv"), attend, self.own)


def mixed(target, other, attend, own):
    """own * attention of `target` + (1 - own) * attention of `other`."""
    if own == 0.0:
        return attend(other)
    return torch.lerp(plain(other), attend(target), own)


def apply(model, self_replace, eta, gamma, layers, schedule):
    with blame(Control):
        number("self_replace", self_replace, 0.0, 1.0)
    start, end = schedule.start_percent, schedule.end_percent
    turn = start + self_replace * (end - start)
    model = steer(model, Modulation(Schedule(start, turn), eta, layers))
    return steer(model, Merging(Schedule(turn, end), gamma, layers))
