"""The guidance run: terms meet the live model, branches join the host's batch, predictions are combined in order.

Four stackable wrappers of the host carry it, none of which holds state:
    OUTER_SAMPLE     makes the Run and drops it with the run, also after an error or interrupt
    PREDICT_NOISE    makes the Call of one model evaluation, leaving it out when no term is active
    CALC_COND_BATCH  lets the extra branches join the guider's own batch (batch.py)
    APPLY_MODEL      perturbs the rows of weak branches, lets rows share what they have in common, counts (batch.py)
"""

import logging
import uuid
from functools import cached_property, partial
from itertools import combinations

from .architectures import depth, one_attention, shared_blocks
from .combine import add, after_cfg, before_cfg, settle
from .gradient import traced
from .layers import listing
from .other import Model
from .stats import Stats
from .steering import (
    CALL,
    PAIRWISE,
    PLAIN,
    RUN,
    SHARE,
    Other,
    Source,
    Text,
    Weak,
    blame,
    in_order,
    overrides,
    with_roles,
)

KEY = "steer"


def install(model):
    """Adds the wrappers to a ModelPatcher that has none of them yet."""
    from comfy.patcher_extension import WrappersMP

    from .batch import apply_model, calc_cond_batch

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
        self.shape = tuple(noise.shape)
        self.size = noise.shape[0]  # items of the batch
        self.state = {}  # term -> what it remembers between steps
        self.beside = None  # the `Live` source that the sampler shows beside x, where it does
        self.renoise = None  # D whose noise the next step keeps, for samplers that ask; None: the D they were handed
        self.needs_negative = False  # whoever acts at this evaluation: for terms that would do without it
        self.spared = None  # [B] bools: items whose negative need not be predicted; None: all are
        self.stats = Stats(noise.shape)
        self.standard = _forms_the_pair(guider)
        self.blocks = shared_blocks(self.model) if guider.model_options.get(SHARE, True) else ()
        self.terms = []
        for term in in_order(guider.model_options):
            with blame(term):
                self._check(term)
                term.prepare(self)
                window = term.schedule.resolve(self.sampling)
                self.terms.append((term, window, tuple(term.branches(self.model))))
                self._warn(term, window)
        self.attention = {term: tuple(term.attention(self.model)) for term, _, _ in self.terms}
        self._conflicts()
        self.features = {term: tuple(term.features(self.model)) for term, _, _ in self.terms}
        self.after = {term: tuple(term.after(self.model)) for term, _, _ in self.terms}
        branches = dict.fromkeys(branch for _, _, needed in self.terms for branch in needed)
        self.others = {branch: Model(branch.model, self) for branch in branches if isinstance(branch, Other)}
        texts = {b: b.conds(guider) for b in branches if isinstance(b, (Text, Source))}
        self.lengths = {branch: len(conds) for branch, conds in texts.items()}
        guider.conds.update((str(branch), conds) for branch, conds in texts.items())

    def _check(self, term):
        guider = type(self.guider).__name__
        remedy = "use KSampler or CFGGuider."
        paired = term.needs_negative or overrides(term, "level")
        if paired and "negative" not in self.guider.original_conds:
            raise ValueError(f"needs a negative conditioning, which {guider} does not have; {remedy}")
        if not self.standard and any(overrides(term, place) for place in PAIRWISE):
            raise ValueError(f"acts on positive - negative, which {guider} combines in its own way; {remedy}")
        for other, _, _ in self.terms:
            if not other.schedule.overlaps(term.schedule):
                continue
            remedy = "keep one, or give them windows (start_percent, end_percent) that do not overlap."
            if term.exclusive and type(other) is type(term):
                raise ValueError(f"the model carries it twice at the same time; {remedy}")
            if overrides(term, "scale") and overrides(other, "scale"):
                raise ValueError(f"sets the guidance weight, and so does {other.node}; {remedy}")

    def _conflicts(self):
        """Raises where two terms replace the same part of one attention at one time."""
        edits = [(term, a) for term, _, _ in self.terms for a in self.attention[term]]
        for (term, a), (other, b) in combinations(edits, 2):
            if term is other or not term.schedule.overlaps(other.schedule):
                continue
            if a.kind != b.kind and not one_attention(self.model):
                continue
            layers, what = set(a.layers) & set(b.layers), set(a.sets) & set(b.sets)
            if layers and what:
                raise ValueError(
                    f"{term.node} and {other.node} both replace the {' and '.join(sorted(what))} of the attention in "
                    f"{listing([layer for layer in a.layers if layer in layers])}; give them other layers, or windows "
                    "(start_percent, end_percent) that do not overlap."
                )

    def _warn(self, term, window):
        """Says so when the term can have no effect in this run."""
        levels = any(overrides(other, "level") for other in in_order(self.guider.model_options))
        everywhere = overrides(term, "level") and not overrides(term, "observe")  # sets the cfg outside its window too
        why = None
        if not everywhere and not any(window.weight(float(sigma)) for sigma in self.sigmas[:-1]):
            why = f"none of the {len(self.sigmas) - 1} steps falls into its window"
        elif self.standard and self.guider.cfg == 1.0 and not levels and not term.needs_negative:
            adds = any(overrides(other, "add") for other in in_order(self.guider.model_options))
            idle = ("observe", "reshape", "scale", *(() if adds else ("transform",)))
            if any(overrides(term, place) for place in idle) and not overrides(term, "instead"):
                why = "cfg is 1, and it acts on what cfg adds"
        if why:
            logging.warning(f"{term.node} has no effect in this run: {why}.")

    def edits_at(self, sigma):
        """True where D differs from what it is under `PLAIN`."""
        return any(term.edits and window.weight(float(sigma)) for term, window, _ in self.terms)

    def depth(self, weak):
        """Number of the first block in which a `Weak` branch differs from the positive."""
        return depth(weak, self.blocks)


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
        self.sources = tuple(branch for branch in self.branches if isinstance(branch, Source))
        self.source_roles = {role for source in self.sources for role in (source, source.negative)}
        self.conds = run.guider.conds
        self.predictions = {}  # "positive", "negative" or branch -> D, as the network gave it
        self.seen = {}  # term -> what it saw of attention
        self.source = {}  # (layer, role) -> features of the source; (layer, kind, depth, role) -> its attention
        self.index = 0  # of the positive among the guider's conds, as other packs' patches know it
        self.options = None  # model_options of this evaluation
        self.graph = None  # (D, x) of `settle`, D differentiable in x, where a term asks for that
        self.joined = False
        self.shares = False  # rows that begin alike are computed once
        self.combined = False
        self.cfg_function = None  # of another node, when it must be asked with changed predictions

    @cached_property
    def level(self):
        """sigma as a float; waits for the device, once."""
        return float(self.sigma.max())

    def overridden(self, *places):
        return any(overrides(term, place) for term, _, _ in self.active for place in places)

    def branch_conds(self, branches):
        """The conditioning of each branch: the positive for the weak, its own for a text.

        A weak one has uuids of its own, the same in every step: whoever caches by uuid (EasyCache) must not mix it
        with the positive.
        """
        return [
            [{**c, "uuid": weak_uuid(c["uuid"], branch)} for c in self.conds["positive"]]
            if isinstance(branch, Weak)
            else self.conds[str(branch)]
            for branch in branches
        ]

    def predict(self, conds, roles, x=None):
        """One more pass of the main network: a D per cond, at this sigma, of this x or another."""
        import comfy.samplers

        model, x = self.run.guider.inner_model, self.x if x is None else x
        return comfy.samplers.calc_cond_batch(model, conds, x, self.sigma, with_roles(self.options, roles))


def weak_uuid(positive, branch):
    return uuid.uuid5(positive, str(branch))


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    run = options[RUN] = Run(guider, noise, sampler, sigmas.cpu())
    try:
        for other in run.others.values():
            other.begin(noise, latent_image, *args, **kwargs)
        output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        del options[RUN]
        for other in run.others.values():
            other.end()
        run.others = {}  # each holds the run
    logging.info(run.stats.line())
    return output


def predict_noise(executor, x, timestep, model_options, seed=None):
    run = model_options["transformer_options"].get(RUN)
    if run is None:
        return executor(x, timestep, model_options, seed)

    run.renoise = run.spared = None
    run.stats.evaluations += 1
    # one look at sigma per evaluation, and none while every term is always on
    sigma = None if all(term.schedule.always for term, _, _ in run.terms) else float(timestep.max())
    plain = model_options["transformer_options"].get(PLAIN, False)
    weighed = [
        (term, 0.0 if plain and term.edits else window.weight(sigma), branches) for term, window, branches in run.terms
    ]
    # a term that edits attention must find all rows of the negative, or none
    keeps = (term.needs_negative or overrides(term, "attention") for term, weight, _ in weighed if weight)
    run.needs_negative = any(keeps)
    guider, cfg = run.guider, getattr(run.guider, "cfg", None)
    try:
        for term, weight, _ in weighed:
            if overrides(term, "level"):
                guider.cfg = term.level(guider.cfg, weight, run)
        return _predict(run, executor, x, timestep, model_options, seed, [each for each in weighed if each[1] != 0.0])
    finally:
        if cfg is not None:
            guider.cfg = cfg


def _predict(run, executor, x, timestep, model_options, seed, active):
    if not active:
        return executor(x, timestep, model_options, seed)
    call = Call(run, x, timestep, model_options["transformer_options"]["sample_sigmas"], active)
    for term, weight, _ in active:
        denoised = term.instead(call, weight)
        if denoised is not None:
            return denoised
    if not any(term.traces(call) for term, _, _ in active):
        return _evaluate(run, call, executor, model_options, seed)
    with traced(call):
        return _evaluate(run, call, executor, model_options, seed).detach()


def _evaluate(run, call, executor, model_options, seed):
    active = call.active
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

    try:
        denoised = executor(call.x, call.sigma, options, seed)
        if not call.combined:  # a guider with arithmetic of its own: what is added, is added to its result
            denoised = settle(call, add(call, denoised, options))
        return denoised
    finally:
        call.options = None  # the two hold each other: without this, all tensors of the step wait for the collector
