"""Source pictures re-run beside the target: as more items of each cond of the one forward, pinned to their trajectory.

Nothing of a source is kept over time: at each evaluation its latent is read off the `Trajectory`, and what an edit
takes from it (attention, features) exists within that forward alone. Rows of the forward, for one cond:

    [source item 0 .. B - 1, (another source's,) target item 0 .. B - 1]

Sources and target are items of one cond because the host may run conds apart, and never the items of one. Where their
conditionings cannot be items of one cond (other areas, texts of another length on a network that knows where a token
stands), the sources go first, each in a forward of its own within the same evaluation.
"""

import math
from dataclasses import dataclass, field

import torch

from .architectures import unet
from .conditioning import text_of
from .steering import IDLE, Source, with_roles

BESIDE = "steer.beside"  # in transformer_options of a forward that holds rows of these sources
OWN = ("model_conds", "uuid", "cross_attn", "pooled_output")  # of a cond: what may differ between items


@dataclass(eq=False)
class Live:
    """What the run's sampler shows the network of a source at one evaluation, as `Run.beside`.

    z: [B, C, ...].  said: D of z, "positive" under the source's text, "negative" under the run's negative, where the
    network was asked.
    """

    z: torch.Tensor
    said: dict = field(default_factory=dict)


def source_of(conditioning, trajectory):
    """The `Source` branch of a CONDITIONING and a Trajectory."""
    text = text_of("source", conditioning)
    return Source(f"{text.digest} {id(trajectory):x}", trajectory, text.conds)


def run_beside(executor, sources, call, model, conds, roles, x, timestep, options):
    """The host's calc_cond_batch of `conds` with `sources` beside them; keeps their predictions in `call`."""
    n, positive = x.shape[0], roles.index("positive")
    together = _together([*(_conds(source, call) for source in sources), conds[positive]], n, _repeats_text(call))
    if together is None:

        def predict(conds, roles, z):
            return executor(model, conds, z, timestep, with_roles(options, roles))

        for source in sources:
            predict_apart(source, call, predict, dict(zip(roles, conds, strict=True)).get("negative"))
        return executor(model, conds, x, timestep, options)
    conds = [together if i == positive else cond for i, cond in enumerate(conds)]
    everyone = torch.cat((*(_latents(source, call, x) for source in sources), x))
    beside = {**options["transformer_options"], BESIDE: sources}
    times = timestep.repeat(len(sources) + 1)
    out = executor(model, conds, everyone, times, {**options, "transformer_options": beside})
    for role, cond, D in zip(roles, conds, out, strict=True):
        if cond is not None and role in ("positive", "negative"):
            for source, its in zip(sources, D.split(n), strict=False):
                _keep(source, call, role, its)
    return [D[-n:] for D in out]


def predict_apart(source, call, predict, negative):
    """The source's predictions from a forward of its own. negative: the run's; None where it has none now."""
    conds = [_conds(source, call), *([] if negative is None else [negative])]
    roles = ("positive", "negative")[: len(conds)]
    out = predict(conds, [source.role(role) for role in roles], _latents(source, call, call.x))
    for role, D in zip(roles, out, strict=True):
        _keep(source, call, role, D)


def _keep(source, call, role, D):
    """What the network said of the source beside the target's `role`."""
    call.predictions[source.role(role)] = D
    if source.trajectory is None:
        call.run.beside.said[role] = D


def edit_features(node, edit, call, layer, source, h, rows):
    """`edit`(h, source) on the rows of every cond of the target in h [rows, C, H, W]; the source's stay."""
    parts = rows.parts()
    for unit, at in parts:
        if source is not None and unit.role in (source, source.negative):
            call.source[layer, unit.role] = h[at]
    edited = h.clone()
    for unit, at in parts:
        if unit.role == IDLE or unit.role in call.source_roles:
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
    """Of the source at this evaluation, as many as the target's x has: one source may be beside all items."""
    from comfy.utils import repeat_to_batch_size

    z = call.run.beside.z if source.trajectory is None else source.trajectory.at(call.level)
    return repeat_to_batch_size(z.to(x), x.shape[0])


def _conds(source, call):
    """Without what the host appended for areas of the target."""
    return call.conds[str(source)][: call.run.lengths[source]]


def _repeats_text(call):
    """True where a text repeated as a whole means the same: attention to it knows no places."""
    return unet.matches(call.run.model.get_model_object("diffusion_model"))


def _together(conds, n, repeats):
    """One cond that has n items of each of `conds`, in order; None where there is no such."""
    from comfy.conds import is_equal

    if any(len(cond) != 1 for cond in conds):
        return None
    *sources, target = (cond[0] for cond in conds)
    for source in sources:
        if not all(is_equal(source.get(k), target.get(k)) for k in {**source, **target} if k not in OWN):
            return None
        if source["model_conds"].keys() != target["model_conds"].keys():
            return None
    named = [cond["model_conds"] for cond in (*sources, target)]
    model_conds = {name: _items([each[name] for each in named], n, repeats) for name in target["model_conds"]}
    return None if None in model_conds.values() else [{**target, "model_conds": model_conds}]


def _items(conds, n, repeats):
    """The host's COND objects as one, n items of each; None where they do not fit."""
    from comfy.conds import CONDConstant, CONDCrossAttn, CONDList, is_equal

    last = conds[-1]
    if any(type(each) is not type(last) for each in conds):
        return None
    values = [each.cond for each in conds]
    if isinstance(last, CONDConstant):
        return last if all(is_equal(value, last.cond) for value in values) else None
    if isinstance(last, CONDList):
        if any(len(value) != len(last.cond) for value in values):
            return None
        found = [_cat(each, n) for each in zip(*values, strict=True)]
        return None if any(each is None for each in found) else type(last)(found)
    lengths = [value.shape[1] for value in values if isinstance(value, torch.Tensor) and value.ndim == 3]
    if isinstance(last, CONDCrossAttn) and repeats and len(lengths) == len(values) and len(set(lengths)) > 1:
        tokens = math.lcm(*lengths)
        if tokens > 4 * min(lengths):  # as the host limits it
            return None
        values = [value.repeat(1, tokens // value.shape[1], 1) for value in values]
    found = _cat(values, n)
    return None if found is None else type(last)(found)


def _cat(values, n):
    from comfy.utils import repeat_to_batch_size

    last = values[-1]
    if any(not isinstance(value, torch.Tensor) or value.shape[1:] != last.shape[1:] for value in values):
        return None
    return torch.cat([repeat_to_batch_size(value.to(last), n) for value in values])
