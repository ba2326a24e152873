"""A ControlNet that attends to tokens of its own in place of the text, and reaches no other ControlNet with them.

The host has one context for all ControlNets of a chain. Here the tokens travel with the conditioning, under a name that
only this ControlNet reads; so the rows of a batch get their own, whatever their order.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch.nn.functional import adaptive_avg_pool2d

from .conditioning import digest
from .mask import fit

CONTEXT, GUIDANCE = "crossattn_controlnet", "guidance"  # what the host hands to a ControlNet


@dataclass(frozen=True)
class Own:
    """name: of its tokens among what a conditioning holds.  mask: where it acts, [1 or B, h, w], or None.
    guidance: in place of the model's distilled guidance, or None."""

    name: str
    mask: torch.Tensor = field(default=None, compare=False, repr=False)
    guidance: float | None = None

    def of(self, cond):
        """`cond` as this ControlNet is to see it."""
        if self.name not in cond:
            raise ValueError("the tokens of a face are gone from its conditioning; wire the node's own outputs.")
        seen = {**cond, CONTEXT: cond[self.name]}
        if self.guidance is not None and cond.get(GUIDANCE) is not None:
            seen[GUIDANCE] = torch.full_like(cond[GUIDANCE], self.guidance)
        return seen

    def masked(self, control, x, conds):
        """What it adds, only where the mask is. x: latents of the forward, of so many conds."""
        if self.mask is None or control is None:
            return control
        mask = fit(self.mask, (len(x) // conds, *x.shape[1:]))
        mask = mask.expand(len(x) // conds, *mask.shape[1:]).repeat(conds, 1, 1, 1)
        return {name: [None if h is None else h * _on(mask, h) for h in hs] for name, hs in control.items()}


def _on(mask, h):
    """The mask [b, 1, H, W] on features [b, C, h, w], or on tokens [b, N, C] of 2 x 2 cells."""
    mask = mask.to(h)
    if h.ndim == 4:
        return adaptive_avg_pool2d(mask, h.shape[-2:])
    return adaptive_avg_pool2d(mask, tuple((n + 1) // 2 for n in mask.shape[-2:])).flatten(1)[..., None]


def added(before, control):
    """What two ControlNets add together, in the host's lists."""
    if before is None or control is None:
        return control or before
    total = {}
    for name in {**before, **control}:
        pair = list(before.get(name, ())), list(control.get(name, ()))
        n = max(map(len, pair))
        rows = zip(*(hs + [None] * (n - len(hs)) for hs in pair), strict=True)
        total[name] = [b if a is None else a if b is None else a + b for a, b in rows]
    return total


@cache
def _kind(kind):
    """The host's class of a ControlNet, with a context of its own."""

    class OwnContext(kind):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            chain, self.previous_controlnet = self.previous_controlnet, None
            try:
                seen = self.own.of(cond)
                control = super().get_control(x_noisy, t, seen, batched_number, transformer_options)
            finally:
                self.previous_controlnet = chain
            control = self.own.masked(control, x_noisy, batched_number)
            if chain is None:
                return control
            return added(chain.get_control(x_noisy, t, cond, batched_number, transformer_options), control)

        def copy(self):
            return with_own(super().copy(), self.own)

    return OwnContext


def with_own(control, own):
    """The ControlNet `control`, a copy that nobody else has, as one with a context of its own."""
    kind = _kind(type(control))
    made = kind.__new__(kind)
    made.__dict__.update(control.__dict__, own=own)
    return made


def controlled(conditionings, control_net, image, strength, window, contexts, vae=None, mask=None, guidance=None):
    """The CONDITIONINGs with one more ControlNet, which attends to `contexts` [1 or B, T, W], one for each of them.

    image: [n, h, w, 3].  window: (start_percent, end_percent).  ValueError where it is no ControlNet with a context.
    """
    from comfy.conds import CONDRegular
    from comfy.controlnet import ControlNet

    if not isinstance(control_net, ControlNet):
        raise ValueError(
            f"control_net is {type(control_net).__name__}, which has no context to replace; load the ControlNet that "
            "belongs to this adapter."
        )
    own = Own(f"steer_{digest([*contexts, image, mask])}", mask, guidance)
    hint, made, out = image[..., :3].movedim(-1, 1), {}, []
    for conditioning, e in zip(conditionings, contexts, strict=True):
        out.append([])
        for cond, options in conditioning:
            chain = options.get("control")
            if chain not in made:
                copy = control_net.copy().set_cond_hint(hint, strength, window, vae=vae)
                made[chain] = with_own(copy, own).set_previous_controlnet(chain)
            conds = {**options.get("model_conds", {}), own.name: CONDRegular(e)}
            control = {"control": made[chain], "control_apply_to_uncond": False, "model_conds": conds}
            out[-1].append([cond, {**options, **control}])
    return out
