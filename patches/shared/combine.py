"""The fixed order in which predictions become the D that the sampler gets."""

import torch

from .beside import predict_apart
from .steering import Other, Source, Text, Weak


def before_cfg(call, args):
    """The first pre_cfg function: keeps what the network said before other nodes edit it."""
    out = args["conds_out"]
    if len(out) > 1:
        out = [out[0], spare(call.run.spared, *out[:2]), *out[2:]]
    call.predictions.update(zip(("positive", "negative"), out, strict=False))
    return out


def spare(spared, positive, negative):
    """The negative of an item that is spared it is its positive, whether or not its row was left out."""
    if spared is None:
        return negative
    spared = torch.tensor(spared, device=positive.device).view(-1, *[1] * (positive.ndim - 1))
    return positive.where(spared, negative)


def after_cfg(call, args):
    """The first post_cfg function: all of Steer's combination, after pre_cfg and before post_cfg of other nodes."""
    call.combined = True
    denoised, pair = args["denoised"], args["uncond"] is not None
    if not pair:
        call.predictions.pop("negative", None)  # the host's zeros
    else:
        for term, weight, _ in call.active:
            term.observe(call, weight)
    if pair and call.overridden("reshape", "scale"):
        denoised = _guide(call, args)
    denoised = add(call, denoised, args["model_options"])
    for term, weight, _ in call.active:
        denoised = term.transform(denoised, call, weight)
    denoised = settle(call, denoised)
    for term, weight, _ in call.active:
        denoised = term.step(denoised, call, weight)
    return denoised


def _guide(call, args):
    """Classifier-free guidance with reshaped difference and own weight, through another node's cfg function if any."""
    x, w = call.x, args["cond_scale"]
    positive, negative = args["cond_denoised"], args["uncond_denoised"]
    if call.overridden("reshape"):
        difference = positive - negative
        for term, weight, _ in call.active:
            difference = term.reshape(difference, positive, call, weight)
        negative = positive - difference
    for term, weight, _ in call.active:
        w = term.scale(w, positive - negative, call, weight)
    if call.cfg_function is None:
        return negative + (positive - negative) * w
    return x - call.cfg_function(
        {
            "cond": x - positive,
            "uncond": x - negative,
            "cond_scale": w,
            "timestep": call.sigma,
            "input": x,
            "sigma": call.sigma,
            "cond_denoised": positive,
            "uncond_denoised": negative,
            "model": args["model"],
            "model_options": args["model_options"],
            "input_cond": args["cond"],
            "input_uncond": args["uncond"],
        }
    )


def add(call, denoised, options):
    """Runs the branches that could not join the guider's batch, then adds each term's share."""
    call.options = options
    late = [branch for branch in call.branches if branch not in call.predictions]
    apart = [branch for branch in late if isinstance(branch, (Weak, Text))]
    if apart:
        conds, roles = call.branch_conds(apart), apart
        if "positive" not in call.predictions:
            conds, roles = [call.conds["positive"], *conds], ["positive", *roles]
        call.predictions.update(zip(roles, call.predict(conds, roles), strict=True))
    for branch in late:
        if isinstance(branch, Source):
            negative = call.conds["negative"] if "negative" in call.predictions else None
            predict_apart(branch, call, call.predict, negative)
        elif isinstance(branch, Other):
            call.predictions[branch] = call.run.others[branch].predict(call.x, call.sigma)
    for term, weight, branches in call.active:
        added = term.add(call, [call.predictions[b] for b in branches], weight)
        denoised = denoised if added is None else denoised + added
    return denoised


def settle(call, denoised):
    """Energies move the combined D, then constraints hold; the graph of the evaluation, where there is one, ends."""
    if denoised.requires_grad:
        call.graph = denoised, call.x
    shifts = [term.energy(denoised, call, weight) for term, weight, _ in call.active]
    call.graph = None
    denoised, call.x = denoised.detach(), call.x.detach()
    call.predictions = {role: D.detach() for role, D in call.predictions.items()}
    for shift in shifts:
        denoised = denoised if shift is None else denoised + shift
    for term, weight, _ in call.active:
        denoised = term.constrain(denoised, call, weight)
    return denoised
