"""The fixed order in which predictions become the D that the sampler gets."""

from .steering import ROLES


def before_cfg(call, args):
    """The first pre_cfg function: keeps what the network said before other nodes edit it."""
    call.predictions.update(zip(("positive", "negative"), args["conds_out"], strict=False))
    return args["conds_out"]


def after_cfg(call, args):
    """The first post_cfg function: all of Steer's combination, after pre_cfg and before post_cfg of other nodes."""
    call.combined = True
    denoised = args["denoised"]
    if args["uncond"] is not None and call.overridden("reshape", "scale"):
        denoised = _guide(call, args)
    denoised = add(call, denoised, args["model_options"])
    for term, _, _ in call.active:
        denoised = term.step(denoised, call)
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
    for term, _, _ in call.active:
        w = term.scale(w)
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
    if call.branches and not all(branch in call.predictions for branch in call.branches):
        import comfy.samplers

        conds, roles = call.branch_conds(), call.branches
        if "positive" not in call.predictions:
            conds, roles = [call.conds["positive"], *conds], ("positive", *roles)
        model = call.run.guider.inner_model
        out = comfy.samplers.calc_cond_batch(model, conds, call.x, call.sigma, with_roles(options, roles))
        call.predictions.update(zip(roles, out, strict=True))
    for term, weight, branches in call.active:
        added = term.add(call.predictions.get("positive"), [call.predictions[b] for b in branches], weight)
        denoised = denoised if added is None else denoised + added
    return denoised


def with_roles(model_options, roles):
    return {**model_options, "transformer_options": {**model_options["transformer_options"], ROLES: roles}}
