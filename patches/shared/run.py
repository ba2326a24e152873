"""The guidance run: terms meet the live model, branches join the host's batch, predictions are combined in order.

Four stackable wrappers of the host carry it, none of which holds state:
    OUTER_SAMPLE     makes the Run and drops it with the run, also after an error or interrupt
    PREDICT_NOISE    makes the Call of one model evaluation, leaving it out when no term is active
    CALC_COND_BATCH  lets the extra branches join the guider's own batch
    APPLY_MODEL      perturbs the rows of weak branches, counts
"""

import logging
import uuid
from functools import partial

from .architectures import adapter_of
from .combine import add, after_cfg, before_cfg, with_roles
from .stats import Stats
from .steering import CALL, PAIRWISE, ROLES, RUN, Weak, blame, in_order, overrides

KEY = "steer"


def install(model):
    """Adds the wrappers to a ModelPatcher that has none of them yet."""
    from comfy.patcher_extension import WrappersMP

    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        if not model.get_wrappers(kind, KEY):
            model.add_wrapper_with_key(kind, KEY, wrapper)


class Run:
    """One sampling run: terms resolved on the live model, and their memory."""

    def __init__(self, guider, noise, sampler, sigmas):
        self.guider = guider
        self.model = guider.model_patcher
        self.sampling = self.model.get_model_object("model_sampling")
        self.sampler = sampler
        self.sigmas = sigmas  # [steps + 1], on the CPU
        self.state = {}  # term -> what it remembers between steps
        self.renoise = None  # D whose noise the next step keeps, for samplers that ask; None: the D they were handed
        self.stats = Stats(noise.shape)
        self.standard = _forms_the_pair(guider)
        self.terms = []
        for term in in_order(guider.model_options):
            with blame(term):
                self._check(term)
                term.prepare(self)
                self.terms.append((term, term.schedule.resolve(self.sampling), tuple(term.branches(self.model))))

    def _check(self, term):
        guider = type(self.guider).__name__
        remedy = "use KSampler or CFGGuider."
        if term.needs_negative and "negative" not in self.guider.original_conds:
            raise ValueError(f"needs a negative conditioning, which {guider} does not have; {remedy}")
        if not self.standard and any(overrides(term, place) for place in PAIRWISE):
            raise ValueError(f"acts on positive - negative, which {guider} combines in its own way; {remedy}")
        if term.exclusive:
            for other, _, _ in self.terms:
                if type(other) is type(term) and other.schedule.overlaps(term.schedule):
                    raise ValueError(
                        "the model carries it twice at the same time; keep one, or give them windows "
                        "(start_percent, end_percent) that do not overlap."
                    )


def _forms_the_pair(guider):
    """True for guiders whose result is the host's cfg_function of (positive, negative)."""
    import comfy.samplers

    return type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise


class Call:
    """One evaluation of the model by the guider: the active terms, and the predictions they work on."""

    def __init__(self, run, x, sigma, sigmas, active):
        self.run = run
        self.x = x
        self.sigma = sigma  # [B], where the model is
        self.sigmas = sigmas  # [steps + 1], the sampler's, where the model is
        self.active = active  # [(term, weight, branches)]
        self.branches = tuple(dict.fromkeys(branch for _, _, branches in active for branch in branches))
        self.conds = run.guider.conds
        self.predictions = {}  # "positive", "negative" or branch -> D, as the network gave it
        self.index = 0  # of the positive among the guider's conds, as other packs' patches know it
        self.joined = False
        self.combined = False
        self.cfg_function = None  # of another node, when it must be asked with changed predictions

    @property
    def level(self):
        """sigma as a float; waits for the device."""
        return float(self.sigma.max())

    def overridden(self, *places):
        return any(overrides(term, place) for term, _, _ in self.active for place in places)

    def branch_conds(self):
        """The positive conditioning once per branch.

        Own uuids, the same in every step: whoever caches by uuid (EasyCache) must not mix them with the positive.
        """
        return [
            [{**c, "uuid": uuid.uuid5(c["uuid"], f"{branch}.{i}")} for i, c in enumerate(self.conds["positive"])]
            for branch in self.branches
        ]


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    run = options[RUN] = Run(guider, noise, sampler, sigmas.cpu())
    try:
        output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        del options[RUN]
    logging.info(run.stats.line())
    return output


def predict_noise(executor, x, timestep, model_options, seed=None):
    run = model_options["transformer_options"].get(RUN)
    if run is None:
        return executor(x, timestep, model_options, seed)

    run.renoise = None
    run.stats.evaluations += 1
    # one look at sigma per evaluation, and none while every term is always on
    sigma = None if all(term.schedule.always for term, _, _ in run.terms) else float(timestep.max())
    weighed = [(term, window.weight(sigma), branches) for term, window, branches in run.terms]
    active = [each for each in weighed if each[1] != 0.0]
    if not active:
        return executor(x, timestep, model_options, seed)

    call = Call(run, x, timestep, model_options["transformer_options"]["sample_sigmas"], active)
    options = {**model_options, "transformer_options": {**model_options["transformer_options"], CALL: call}}
    if any(term.needs_negative for term, _, _ in active):
        options["disable_cfg1_optimization"] = True
    if run.standard:
        for name, function in (
            ("sampler_pre_cfg_function", before_cfg),
            ("sampler_post_cfg_function", after_cfg),
        ):
            options[name] = [partial(function, call), *options.get(name, ())]
        if call.overridden("reshape", "scale"):
            call.cfg_function = options.pop("sampler_cfg_function", None)
    # where another node runs the conds in its own way, our branches follow in a call of their own
    call.joined = "sampler_calc_cond_batch_function" in options or "context_handler" in options

    denoised = executor(x, timestep, options, seed)
    if not call.combined:  # a guider with arithmetic of its own: what is added, is added to its result
        denoised = add(call, denoised, options)
    return denoised


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
    if not call.branches:
        return executor(model, conds, x, timestep, with_roles(model_options, roles))
    # The host lays rows out from the last cond to the first. The positive goes last, a branch takes its place: so the
    # first row that other packs find under the positive's index is the positive, and index 1 is still the negative.
    first, *others = call.branches
    conds, roles = list(conds), list(roles)
    count, positive = len(conds), conds[index]
    conds[index], *more = call.branch_conds()
    roles[index] = first
    conds += [*more, positive]
    roles += [*others, "positive"]
    options = with_roles(model_options, tuple(roles))
    if "model_function_wrapper" in options:
        options["model_function_wrapper"] = partial(_known_indices, call, roles, options["model_function_wrapper"])
    out = executor(model, conds, x, timestep, options)
    call.predictions.update(zip(roles, out, strict=True))
    out[index] = out[-1]
    return out[:count]


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    options = transformer_options
    run, roles = options.get(RUN), options.get(ROLES)
    if run is not None:
        if not run.stats.evaluations:
            raise ValueError(
                f"Steer: {type(run.guider).__name__} does not call the host's PREDICT_NOISE wrappers, so that steering "
                "cannot act; use KSampler, CFGGuider or another guider."
            )
        indices = options["cond_or_uncond"]
        chunks = [roles[i] if roles else "other" for i in indices]
        run.stats.count(chunks, x)
        if any(isinstance(role, Weak) for role in chunks):
            call = options[CALL]
            options = {**options, "cond_or_uncond": _true_indices(call, roles, indices)}
            layers = dict.fromkeys(layer for role in chunks if isinstance(role, Weak) for layer in role.layers)
            edits = {
                layer: [role.edit if isinstance(role, Weak) and layer in role.layers else None for role in chunks]
                for layer in layers
            }
            adapter_of(run.model.model).edit_self_attention(options, edits)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _true_indices(call, roles, indices):
    """cond_or_uncond as other packs know it: a weak row is a positive one."""
    return [call.index if roles[i] == "positive" or isinstance(roles[i], Weak) else i for i in indices]


def _known_indices(call, roles, wrapper, apply, args):
    return wrapper(apply, {**args, "cond_or_uncond": _true_indices(call, roles, args["cond_or_uncond"])})
