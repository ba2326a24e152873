"""What a MODEL carries, in words, in the order in which it will act; and whether its rows may share work."""

from ..shared.architectures import depth, shared_blocks
from ..shared.steering import SHARE, Other, Weak, blame, in_order, overrides

PLACES = {
    "attention": "edits attention",
    "features": "edits features",
    "level": "sets the cfg of each step",
    "instead": "takes steps without the network",
    "observe": "watches the predictions",
    "reshape": "reshapes the guidance difference",
    "scale": "sets the guidance weight",
    "add": "adds a difference",
    "transform": "changes the guided result",
    "energy": "moves the clean estimate down a loss",
    "constrain": "holds the clean estimate to a measurement",
    "step": "sets the step",
}
# model_options of the host that other nodes fill, and when they act
FOREIGN = {
    "model_function_wrapper": "around every forward",
    "sampler_calc_cond_batch_function": "runs the conditionings; Steer's branches then take a call of their own",
    "sampler_pre_cfg_function": "before Steer",
    "sampler_cfg_function": "does the guidance; Steer hands it the reshaped predictions",
    "sampler_post_cfg_function": "after Steer",
}


def describe(model, cfg=True):
    """Text about a ModelPatcher. cfg: whether the sampler runs a negative row too."""
    terms = in_order(model.model_options)
    lines = [f"{type(model.model).__name__} carries {len(terms)} term{'s' * (len(terms) != 1)} of steering"]
    branches = {}
    for place, what in PLACES.items():
        for term in terms:
            if overrides(term, place):
                lines.append(f"  {what}: {term.node} ({settings(term)}) {window(term)}")
    for term in terms:
        with blame(term):
            branches[term] = set(term.branches(model))
    lines.append("Forwards per step")
    edges = sorted({0.0, 1.0, *(p for t in terms for p in (t.schedule.start_percent, t.schedule.end_percent))})
    for first, last in zip(edges, edges[1:], strict=False):
        active = [t for t in terms if t.schedule.start_percent <= first and t.schedule.end_percent >= last]
        lines.append(f"  {first:.0%} to {last:.0%}: {forwards(active, branches, guided(terms, active, cfg))}")
    weak = {branch for needed in branches.values() for branch in needed if isinstance(branch, Weak)}
    if weak and not model.model_options.get(SHARE, True):
        lines.append("Weak rows are computed from the start: sharing is switched off")
    elif weak and (blocks := shared_blocks(model)):
        lines += sorted(f"{branch} {shared(branch, blocks)}" for branch in weak)
    foreign = [f"  {name}: {when}" for name, when in FOREIGN.items() if model.model_options.get(name)]
    return "\n".join(lines + (["From other nodes"] + foreign if foreign else []))


def guided(terms, active, cfg):
    """Whether the sampler's guider asks for a negative while the terms `active` act."""
    w = 2.0 if cfg else 1.0
    for term in terms:
        if overrides(term, "level") and not overrides(term, "observe"):  # what is observed is not known yet
            w = term.level(w, float(term in active), None)
    return w != 1.0


def forwards(active, branches, cfg):
    """Rows and calls while the terms `active` act."""
    rows = ["positive"]
    if cfg or any(term.needs_negative for term in active):
        rows.append("negative")
    needed = {branch for term in active for branch in branches[term]}
    rows += sorted(str(branch) for branch in needed if not isinstance(branch, Other))
    text = f"{len(rows)} rows in 1 call ({', '.join(rows)})"
    apart = sorted(str(branch) for branch in needed if isinstance(branch, Other))
    apart += [f"a second look for {term.node}" for term in active if term.again]
    return text + "".join(f", and 1 row in a call of its own ({name})" for name in apart)


def shared(weak, blocks):
    """From which block on a weak row is computed."""
    first = depth(weak, blocks)
    return f"is the positive up to {blocks[first].layer} (block {first + 1} of {len(blocks)}), which is computed once"


def settings(term):
    return ", ".join(f"{name} {value}" for name, value in vars(term).items() if name != "schedule")


def window(term):
    schedule = term.schedule
    curve = ", with a curve" if schedule.curve else ""
    return f"from {schedule.start_percent:.0%} to {schedule.end_percent:.0%}{curve}"


def sharing(model, on):
    """A clone of `model` whose rows share what they have in common, or do not."""
    model = model.clone()
    model.model_options[SHARE] = on
    return model
