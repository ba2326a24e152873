"""What a MODEL carries, in words, in the order in which it will act."""

from ..shared.steering import blame, in_order, overrides

PLACES = {
    "level": "sets the cfg",
    "reshape": "reshapes the guidance difference",
    "scale": "sets the guidance weight",
    "add": "adds a difference",
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
        rows = ["positive"]
        w = 2.0 if cfg else 1.0
        for term in terms:
            if overrides(term, "level") and not overrides(term, "observe"):
                w = term.level(w, float(term in active), None)
        if w != 1.0 or any(term.needs_negative for term in active):
            rows.append("negative")
        rows += sorted({str(branch) for term in active for branch in branches[term]})
        lines.append(f"  {first:.0%} to {last:.0%}: {len(rows)} rows in 1 call ({', '.join(rows)})")
    foreign = [f"  {name}: {when}" for name, when in FOREIGN.items() if model.model_options.get(name)]
    return "\n".join(lines + (["From other nodes"] + foreign if foreign else []))


def settings(term):
    return ", ".join(f"{name} {value}" for name, value in vars(term).items() if name != "schedule")


def window(term):
    schedule = term.schedule
    curve = ", with a curve" if schedule.curve else ""
    return f"from {schedule.start_percent:.0%} to {schedule.end_percent:.0%}{curve}"
