"""Subtractive negative prompts: negation of Composable Diffusion (Liu et al. 2022, arXiv 2206.01714)."""

from dataclasses import dataclass

import torch

from ..shared.conditioning import refuse_hooks, text_of
from ..shared.steering import Term, Text, blame, number, steer


@dataclass(frozen=True)
class Negative(Term):
    """- w_minus (D_n - D_0), added to D_0 + w (D_p - D_0): D_0 of the run's negative, D_n of `text`.

    With w_minus = w - 1 the sum is D_n + w (D_p - D_n): the negative in the place of D_0.
    """

    text: Text = None
    w_minus: float = 1.0
    node = "SteerNegative"
    needs_negative = True

    @property
    def off(self):
        return super().off or self.w_minus == 0.0

    def check(self):
        number("scale", self.w_minus)

    def prepare(self, run):
        ours, theirs = self.text.conds(run.guider), run.guider.original_conds["positive"]
        for name, what in (("cross_attn", "tokens"), ("pooled_output", "a pooled output")):
            widths = [{c[name].shape[-1] for c in conds if c.get(name) is not None} for conds in (ours, theirs)]
            if all(widths) and not widths[0] <= widths[1]:
                have, want = (", ".join(map(str, sorted(w))) for w in widths)
                raise ValueError(
                    f"its conditioning has {what} of width {have}, the sampler's positive of width {want}; encode it "
                    "with the text encoder (CLIP) of this model."
                )

    def branches(self, model):
        return (self.text,)

    def add(self, call, predictions, weight):
        (D_n,), D_0 = predictions, call.predictions["negative"]
        covered = (D_n != 0).any(1, keepdim=True)  # the host leaves 0 outside of areas, masks and timestep ranges
        return torch.where(covered, D_n - D_0, 0.0) * (-self.w_minus * weight)


def apply(model, conditioning, w_minus, schedule):
    with blame(Negative):
        if not conditioning:
            raise ValueError("its conditioning is empty; encode a prompt for it.")
        refuse_hooks(conditioning)
    return steer(model, Negative(schedule, text_of("negative", conditioning), w_minus))
