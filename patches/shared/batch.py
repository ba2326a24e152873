"""The extra branches in the host's own batch: how they get in, and what happens to their rows in the network."""

import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

from .after import after_of
from .architectures import adapter_of, hold, needs_hooks
from .attention import perturb
from .beside import BESIDE, edit_features, run_beside
from .control import Shared, residuals, whole
from .mirror import mirrors_of
from .rows import Edited, Rows, Unit
from .run import weak_uuid
from .steering import CALL, IDLE, ROLES, RUN, Other, Source, Text, Weak, overrides, with_roles

COUPLING = "nag"  # in the name of a patch that lets rows of one batch act on each other


def calc_cond_batch(executor, model, conds, x, timestep, model_options):
    options = model_options["transformer_options"]
    run, call = options.get(RUN), options.get(CALL)
    if run is None or model is not run.guider.inner_model or ROLES in options:
        return executor(model, conds, x, timestep, model_options)

    role_of = {id(cond): role for role, cond in run.guider.conds.items()}
    roles = tuple(role_of.get(id(cond), "other") for cond in conds)  # "other": slices of a context window, say
    if call is None or call.joined or "positive" not in roles:
        return executor(model, conds, x, timestep, with_roles(model_options, roles))

    call.joined = True
    call.index = index = roles.index("positive")
    # texts first: the later in the list, the earlier in the batch, where other packs find "the" negative
    own = (b for b in call.branches if not isinstance(b, (Other, Source)))
    branches = sorted(own, key=lambda b: not isinstance(b, Text))
    conds, roles, count = list(conds), list(roles), len(conds)
    if branches:
        # The host lays rows out from the last cond to the first. The positive goes last, a branch takes its place: so
        # the first row that other packs find under the positive's index is the positive, and index 1 is the negative.
        first, *others = branches
        positive = conds[index]
        conds[index], *more = call.branch_conds(branches)
        roles[index] = first
        conds += [*more, positive]
        roles += [*others, "positive"]
    call.shares = run.blocks and unsafe(model_options) is None and not repeated(call.conds["positive"])
    if call.shares:
        conds = _share_controls(run, call, conds)
    options = with_roles(model_options, roles)
    if "model_function_wrapper" in options:
        options["model_function_wrapper"] = partial(_known_indices, call, roles, options["model_function_wrapper"])
    if call.sources:
        out = run_beside(executor, call.sources, call, model, conds, roles, x, timestep, options)
    else:
        out = executor(model, conds, x, timestep, options)
    call.predictions.update(zip(roles, out, strict=True))
    if branches:
        out[index] = out[-1]
    return out[:count]


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    options = transformer_options
    run = options.get(RUN)
    if run is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if not run.stats.evaluations:
        raise ValueError(
            f"Steer: {type(run.guider).__name__} reaches the network without the host's PREDICT_NOISE "
            "wrappers, so that steering cannot act. The guider or the sampler goes its own way: use KSampler, or "
            "another guider and another sampler."
        )
    call, size = options.get(CALL), x.shape[0]
    units = _units(run, call, options, size)
    edits, skips, mirrors = _edits(run, call, units)
    features, after = _features(run, call), after_of(run, call, units)
    keeps = _keeps(call, units)
    rows, held, added, given = None, nullcontext(), control, dict(kwargs)
    for term, weight, _ in call.active if call else ():
        if overrides(term, "pooled") and given.get("y") is not None:
            width = size // len(units)
            places = [(unit.role, slice(n * width, (n + 1) * width)) for n, unit in enumerate(units)]
            given["y"] = term.pooled(given["y"], places, call, weight)
    if edits or skips or features or after.edits or any(unit.joins for unit in units):
        options = dict(options)
        rows = Rows(options, units, x.shape, edits, skips, features, keeps, call and call.source, mirrors)
        rows.after = after
        adapter = adapter_of(run.model.model)
        if needs_hooks(adapter, rows) and unsafe_for_hooks(options):
            raise ValueError(f"Steer: {unsafe_for_hooks(options)}, so that blocks cannot be steered; leave that out.")
        if rows.shares:
            added = residuals(control, rows)
        held = hold(adapter, executor.class_obj.diffusion_model, options, rows)
    else:  # texts of ours alone: their rows are still not where other packs count them
        options = {**options, "cond_or_uncond": [unit.index for unit in units], "uuids": [unit.uuid for unit in units]}
    try:
        with held:
            out = executor(x, t, c_concat, c_crossattn, added, options, **given)
    except RuntimeError as error:
        from comfy.model_management import is_oom

        if rows is None or not rows.shares or is_oom(error):
            raise
        # a patch that brings tensors for the whole batch meets fewer rows: once more without sharing, and from now on
        logging.warning(f"Steer: another node cannot follow shared rows, so every row is computed in full ({error}).")
        run.blocks, call.shares = (), False
        control = whole(control, rows)
        return apply_model(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    run.stats.count(units, x, rows)
    return out


def _units(run, call, options, size):
    """The batch as units: one per chunk, or one per row where some items are spared their negative."""
    indices, roles = options["cond_or_uncond"], options.get(ROLES)
    chunks = [roles[i] if roles else "other" for i in indices]
    units = [
        Unit(role, _true_index(call, role, i), uuid, n)
        for n, (role, i, uuid) in enumerate(zip(chunks, indices, options["uuids"], strict=True))
    ]
    beside = options.get(BESIDE)
    if call is None or not call.shares:
        return units if beside is None else _parts(run, units, beside)
    positives = {unit.uuid: n for n, unit in enumerate(units) if unit.role == "positive"}
    for n, unit in enumerate(units):
        if isinstance(unit.role, Weak):
            for uuid, source in positives.items():
                if weak_uuid(uuid, unit.role) == unit.uuid:
                    units[n] = replace(unit, source=source, joins=run.depth(unit.role))
    if beside is not None:
        units = _parts(run, units, beside)
        positives = {unit.uuid: n for n, unit in enumerate(units) if unit.role == "positive"}
    if run.spared is None or not positives or all(unit.role != "negative" for unit in units):
        return units
    return _single_rows(run, units, size // len(units), next(iter(positives.values())))


def _parts(run, units, beside):
    """Each unit as the rows of the sources and the target's; those of a source that nobody asks for come in at the
    end."""
    positive = next((n for n, unit in enumerate(units) if unit.role == "positive"), None)
    parts, width = [], len(beside) + 1
    for n, unit in enumerate(units):
        for i, each in enumerate(beside):
            role, source, joins = each.role(unit.role), width * n + i, 0
            if role == IDLE and positive is not None and unit.joins:
                source, joins = width * positive + i, len(run.blocks)
            parts.append(replace(unit, role=role, source=source, joins=joins))
        parts.append(replace(unit, source=width * unit.source + width - 1))
    return parts


def _single_rows(run, units, size, positive):
    """Units of one row each; the negative of a spared item comes in after the last block, as a copy of `positive`."""
    rows = []
    for unit in units:
        for row in range(size):
            source, joins = unit.source, unit.joins
            if unit.role == "negative" and run.spared[row % run.size]:
                source, joins = positive, len(run.blocks)
            rows.append(replace(unit, source=source * size + row, joins=joins))
    return rows


def _edits(run, call, units):
    """{(layer, kind): {role: [Edited]}}, {layer: {roles that leave it out}} and {layer: {roles that mirror}} for what
    is in this batch."""
    edits, skips = {}, {}
    roles = dict.fromkeys(unit.role for unit in units)
    targets = [role for role in roles if role != IDLE and not (call and role in call.source_roles)]
    for term, weight, _ in call.active if call else ():
        for a in run.attention[term]:
            for place in product(a.layers, (a.kind,)):
                at = edits.setdefault(place, {})
                for role in targets:
                    if role in a.beside or not (a.negative or role == "positive" or isinstance(role, Weak)):
                        continue
                    near = tuple(b.beside(role) if isinstance(b, Source) else b for b in a.beside)
                    edit = partial(_edited, term.node, a.edit, call=call, weight=weight, role=role)
                    at.setdefault(role, []).append(Edited(edit, near))
    for role in roles:
        if isinstance(role, Weak):  # what perturbs is the last before the host
            for layer in role.layers:
                if role.edit is None:
                    skips.setdefault(layer, set()).add(role)
                else:
                    at = edits.setdefault((layer, "self"), {})
                    at.setdefault(role, []).append(Edited(partial(perturb, role.edit)))
    if any(isinstance(role, Text) and role.mirrors for role in roles):
        blocks = adapter_of(run.model.model).blocks(run.model.get_model_object("diffusion_model"))
        mirrors, left_out = mirrors_of(roles, edits, blocks)
        for layer, those in left_out.items():
            skips.setdefault(layer, set()).update(those)
        return edits, skips, mirrors
    return edits, skips, {}


def _edited(node, edit, target, beside, **options):
    """`edit`, where it finds beside its rows what it asked for."""
    for other in beside:
        if other is None:
            raise ValueError(
                f"{node}: what it takes attention from is not in this forward; another node (context windows, regions) "
                "runs the conditionings in parts, or there is no memory for all of them at once."
            )
        if other.places != target.places:
            raise ValueError(
                f"{node}: the source fills the latent, a conditioning of the target only a part of it ({target.layer}: "
                f"{other.places} and {target.places} tokens); take off its area."
            )
    return edit(target, beside, **options)


def _keeps(call, units):
    """Roles of sources whose attention forwards that follow in this evaluation will ask for."""
    if not call or not call.sources:
        return ()
    roles = {unit.role for unit in units}
    apart = "positive" not in roles  # the source by itself
    rest = any(isinstance(b, (Weak, Text)) and b not in roles for b in call.branches)
    return call.source_roles if apart or rest else ()


def _features(run, call):
    """{layer: edit of all its rows} for the blocks whose output a term edits."""
    features = {}
    for term, weight, branches in call.active if call else ():
        source = next((b for b in branches if isinstance(b, Source)), None)
        for layer, edit in run.features[term]:
            edit = partial(edit_features, term.node, partial(edit, call=call, weight=weight), call, layer, source)
            features.setdefault(layer, []).append(edit)
    return features


def _share_controls(run, call, conds):
    """The same conds, with ControlNets that are not asked for rows that join later."""
    shared = {}

    def starters(options, x):
        units = _units(run, call, options, x.shape[0])
        chosen = [n for n, unit in enumerate(units) if not unit.joins]
        whole = len(chosen) == len(units) or len(units) != len(options["cond_or_uncond"])
        return None if whole else chosen

    def share(cond):
        if "control" not in cond:
            return cond
        control = cond["control"]
        return {**cond, "control": shared.setdefault(id(control), Shared(control, starters))}

    return [cond if cond is None else [share(c) for c in cond] for cond in conds]


def _true_index(call, role, index):
    """cond_or_uncond as other packs know it: a weak row is a positive one, another text a negative one."""
    if role == "positive" or isinstance(role, Weak):
        return call.index if call else index
    if isinstance(role, Text):
        return 1 - call.index if call.index < 2 else 1
    return index


def _known_indices(call, roles, wrapper, apply, args):
    indices = [_true_index(call, roles[i], i) for i in args["cond_or_uncond"]]
    return wrapper(apply, {**args, "cond_or_uncond": indices})


def unsafe(model_options):
    """Why rows must not be shared under these model_options, or None."""
    options = model_options["transformer_options"]
    if "multigpu_clones" in model_options:
        return "the batch is spread over several GPUs"
    for patches in options.get("patches", {}).values():
        if any(COUPLING in getattr(patch, "__qualname__", "").lower() for patch in patches):
            return "another node lets the rows of a batch act on each other"
    if "double_block" in options.get("patches", {}):
        return "another node works between the blocks, on rows of the latent too"
    return unsafe_for_hooks(options)


def unsafe_for_hooks(options):
    """Why hooks on blocks might not be called, or None."""
    if any("torch.compile" in wrappers for wrappers in options.get("wrappers", {}).values()):
        return "the model is compiled"
    return None


def repeated(conds):
    """True when two conds have the same uuid, so that it does not tell which is which."""
    return max(Counter(cond["uuid"] for cond in conds).values(), default=0) > 1
