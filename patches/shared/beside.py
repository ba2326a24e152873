"""A source picture re-run beside the target: as more items of each cond of the one forward, pinned to its trajectory.

Nothing of the source is kept over time: at each evaluation its latent is read off the `Trajectory`, and what an edit
takes from it (attention, features) exists within that forward alone. Rows of the forward, for one cond:

    [source item 0 .. B - 1, target item 0 .. B - 1]

so an edit of attention that is given both roles sees the source in the first half. Source and target are items of one
cond because the host may run conds apart, and never the items of one. Where their conditionings cannot be items of one
cond (other areas, texts of another length on a network that knows where a token stands), the source goes first, in a
forward of its own within the same evaluation.
"""

import math

import torch

from .architectures import unet
from .conditioning import text_of
from .steering import IDLE, Source, with_roles

BESIDE = "steer.beside"  # in transformer_options of a forward that holds source rows
OWN = ("model_conds", "uuid", "cross_attn", "pooled_output")  # of a cond: what may differ between items


def source_of(conditioning, trajectory):
    """The `Source` branch of a CONDITIONING and a Trajectory."""
    text = text_of("source", conditioning)
    return Source(f"{text.digest} {id(trajectory):x}", trajectory, text.conds)


def run_beside(executor, source, call, model, conds, roles, x, timestep, options):
    """The host's calc_cond_batch of `conds` with the source beside them; keeps the source's predictions in `call`."""
    n, positive = x.shape[0], roles.index("positive")
    together = _together(_conds(source, call), conds[positive], n, _repeats_text(call))
    if together is None:

        def predict(conds, roles, z):
            return executor(model, conds, z, timestep, with_roles(options, roles))

        predict_apart(source, call, predict, dict(zip(roles, conds, strict=True)).get("negative"))
        return executor(model, conds, x, timestep, options)
    conds = [together if i == positive else cond for i, cond in enumerate(conds)]
    both = torch.cat((_latents(source, call, x), x)), torch.cat((timestep, timestep))
    beside = {**options["transformer_options"], BESIDE: source}
    out = executor(model, conds, *both, {**options, "transformer_options": beside})
    for role, cond, D in zip(roles, conds, out, strict=True):
        if cond is not None and role in ("positive", "negative"):
            call.predictions[source.role(role)] = D[:n]
    return [D[n:] for D in out]


def predict_apart(source, call, predict, negative):
    """The source's predictions from a forward of its own. negative: the run's; None where it has none now."""
    conds = [_conds(source, call), *([] if negative is None else [negative])]
    roles = [source, source.negative][: len(conds)]
    out = predict(conds, roles, _latents(source, call, call.x))
    call.predictions.update(zip(roles, out, strict=True))


def edit_features(node, edit, call, layer, source, h, rows):
    """`edit`(h, source) on the rows of every cond of the target in h [rows, C, H, W]; the source's stay."""
    parts = rows.parts()
    for unit, at in parts:
        if source is not None and unit.role in (source, source.negative):
            call.source[layer, unit.role] = h[at]
    edited = h.clone()
    for unit, at in parts:
        if unit.role == IDLE or isinstance(unit.role, Source) or source is not None and unit.role == source.negative:
            continue
        content = None
        if source is not None:
            content = call.source[layer, source.beside(unit.role)]
            if content.shape != h[at].shape:
                raise ValueError(
                    f"{node}: the source fills the latent, a conditioning of the target only a part of it ({layer}: "
                    f"{tuple(content.shape[2:])} and {tuple(h.shape[2:])}); take off its area."
                )
        edited[at] = edit(h[at], content)
    return edited


def _latents(source, call, x):
    """Of the trajectory at this evaluation, as many as the target's x has: one source may be beside all items."""
    from comfy.utils import repeat_to_batch_size

    return repeat_to_batch_size(source.trajectory.at(call.level).to(x), x.shape[0])


def _conds(source, call):
    """Without what the host appended for areas of the target."""
    return call.conds[str(source)][: call.run.lengths[source]]


def _repeats_text(call):
    """True where a text repeated as a whole means the same: attention to it knows no places."""
    return unet.matches(call.run.model.get_model_object("diffusion_model"))


def _together(source, target, n, repeats):
    """One cond whose first n items are `source` and whose next n are `target`; None where there is no such."""
    from comfy.conds import is_equal

    if len(source) != 1 or len(target) != 1:
        return None
    (source,), (target,) = source, target
    if not all(is_equal(source.get(k), target.get(k)) for k in {**source, **target} if k not in OWN):
        return None
    a, b = source["model_conds"], target["model_conds"]
    if a.keys() != b.keys():
        return None
    model_conds = {name: _items(a[name], b[name], n, repeats) for name in b}
    return None if None in model_conds.values() else [{**target, "model_conds": model_conds}]


def _items(a, b, n, repeats):
    """The host's COND objects `a`, `b` as one, items of a first; None where they do not fit."""
    from comfy.conds import CONDConstant, CONDCrossAttn, CONDList, is_equal

    if type(a) is not type(b):
        return None
    if isinstance(a, CONDConstant):
        return b if is_equal(a.cond, b.cond) else None
    if isinstance(a, CONDList):
        pairs = [_cat(p, q, n) for p, q in zip(a.cond, b.cond, strict=False)]
        fit = len(a.cond) == len(b.cond) and all(pair is not None for pair in pairs)
        return type(b)(pairs) if fit else None
    p, q = a.cond, b.cond
    if isinstance(a, CONDCrossAttn) and repeats and p.ndim == q.ndim == 3 and p.shape[1] != q.shape[1]:
        tokens = math.lcm(p.shape[1], q.shape[1])
        if tokens > 4 * min(p.shape[1], q.shape[1]):  # as the host limits it
            return None
        p, q = (t.repeat(1, tokens // t.shape[1], 1) for t in (p, q))
    both = _cat(p, q, n)
    return None if both is None else type(b)(both)


def _cat(p, q, n):
    from comfy.utils import repeat_to_batch_size

    if not all(isinstance(t, torch.Tensor) for t in (p, q)) or p.shape[1:] != q.shape[1:]:
        return None
    return torch.cat([repeat_to_batch_size(t, n) for t in (p, q.to(p))])
