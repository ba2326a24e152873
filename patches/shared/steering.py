"""The stack of terms a MODEL carries, and what a term is.

A term is a frozen value. It says which predictions it needs beside the host's own, and changes the combination of
predictions at fixed places, in this order whatever the order of the nodes:

    level      the cfg of this evaluation                  (guidance schedule, Adaptive Guidance)
    instead    a D without asking the network              (zero-init)
    observe    true predictions are seen                   (Adaptive Guidance)
    reshape    d = D_positive - D_negative                 (CFG-Zero*, TCFG, APG, FDG)
    scale      the weight w of d                           (CFG++, beta-CFG, FDG)
    add        D = D_negative + w d + ...                  (PAG, SEG, SLG, SAG, AutoGuidance, negatives)
    transform  D as a whole                                (rescale)
    energy     what losses of D add to it                  (rewards, classifiers, measurements)
    constrain  D held to what must be true of it           (measurements)
    step       D as the sampler gets it                    (CFG++, TAG)

Predictions are clean estimates D(x, sigma), in the latent space in which the model works, [B, C, ...] of any rank.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .attention import Attention, Edit
from .layers import Layer
from .schedule import Schedule

STACK = "steer"  # in model_options: the tuple of terms
SHARE = "steer.share"  # in model_options: False where rows must not share what they have in common
IDLE = "source, unused"  # role of source rows that nobody asks for
# in transformer_options, for the time of one sampling run, one evaluation, one batch of conds:
RUN, CALL, ROLES = "steer.run", "steer.call", "steer.roles"
PLAIN = "steer.plain"  # True where a sampler asks for D without the terms that edit the network


@dataclass(frozen=True)
class Weak:
    """The positive conditioning through a perturbed network: in `layers`, self-attention goes through `edit`, or,
    where `edit` is None, the blocks are left out.

    Equal branches are one prediction, whichever nodes ask for it.
    """

    name: str
    edit: Edit | None
    layers: tuple[Layer, ...]

    def __str__(self):
        return f"weak:{self.name}[{', '.join(map(str, self.layers))}]"


@dataclass(frozen=True)
class Text:
    """Another conditioning through the same network; the host prepares it with the others when the run starts.

    conds: guider -> the conditioning as the host's `convert_cond` gives it.
    mirrors: it is asked about the positive's picture: its image tokens are the positive's as they enter each block, up
        to the last in which an `Attention` reads it; there it ends, and its prediction means nothing.
    """

    name: str
    digest: str  # equal digests are one prediction
    conds: Callable = field(compare=False, repr=False)
    mirrors: bool = False

    def __str__(self):
        return f"text:{self.name}-{self.digest}"


@dataclass(frozen=True)
class Other:
    """The positive conditioning through another ModelPatcher, in a call of its own."""

    name: str
    digest: str
    model: Any = field(compare=False, repr=False)

    def __str__(self):
        return f"model:{self.name}"


@dataclass(frozen=True)
class Source:
    """A source picture beside the target (beside.py): the network at the latent of a `Trajectory`, under conds of its
    own and under the run's negative.

    digest: equal ones are one prediction.  conds: as for `Text`.
    trajectory: None where the run's sampler itself shows the network a source: `Run.beside` is what it shows.
    """

    digest: str
    trajectory: Any = field(compare=False, repr=False)
    conds: Callable = field(compare=False, repr=False)

    def __str__(self):
        return f"source:{self.digest}"

    @property
    def negative(self):
        """Role of the prediction under the run's negative."""
        return f"{self}, negative"

    def role(self, target):
        """Role of the rows beside those of the role `target`."""
        return {"positive": self, "negative": self.negative}.get(target, IDLE)

    def beside(self, target):
        """Role of the rows whose content belongs to those of the role `target`: a branch that differs in something else
        has the content of the positive."""
        return self.negative if target == "negative" else self


@dataclass(frozen=True)
class Term:
    """One piece of steering; a method overrides the places it changes.

    `weight` is the schedule's at this step; while it is 0 a term is asked for its `level` alone. Each item of the
    batch is treated by itself. `call` is the `run.Call` of this evaluation: x, sigma, predictions as the network gave
    them, the run.
    """

    schedule: Schedule = Schedule()
    node: ClassVar[str]  # id of the node, for messages
    rank: ClassVar[int] = 0  # lower ranks come first in each place
    needs_negative: ClassVar[bool] = False  # also where the sampler's cfg is 1
    exclusive: ClassVar[bool] = False  # two of it at the same time have no meaning
    again: ClassVar[bool] = False  # asks the network once more, when the predictions are there
    edits: ClassVar[bool] = False  # changes what the network says of positive and negative; see PLAIN

    @property
    def off(self):
        """True when the term cannot change anything in any run."""
        return self.schedule.closed

    def check(self):
        """Raises ValueError for numbers that make no sense; see `number`."""

    def uses(self):
        """The ModelPatchers whose weights it uses, which the host loads with the model."""
        return ()

    def prepare(self, run):
        """Checks the term against model, sampler and sigmas before the first step; raises ValueError."""

    def branches(self, model):
        """The `Weak`, `Text`, `Other`, `Source` predictions it needs while it is active, on this ModelPatcher."""
        return ()

    def attention(self, model) -> tuple[Attention, ...]:
        """Edits of attention while the network runs, on this ModelPatcher."""
        return ()

    def features(self, model):
        """Edits of what blocks of a UNet put out: [(layer, edit)], edit(h, source, call=, weight=) -> h. With
        `Residual(layer)`, of what the decoder's ResBlock there adds to what goes into it.

        h: [b, C, H, W], rows of one cond of the target.  source: the same of the source beside it (`Source`), or None.
        """
        return ()

    def after(self, model):
        """Edits of the image tokens that blocks of a transformer leave: [(layer, edit)], edit(hidden, target, call=,
        weight=, role=) -> hidden.

        hidden: [b, N, C], rows of one cond of the target, with what other terms added.  target: AttnCall of these
        tokens, q, k and v of it the hidden states without that, raw as the `taps` of the architecture have it.
        """
        return ()

    def pooled(self, y, rows, call, weight):
        """The pooled texts [rows of the forward, D] in place of `y`. rows: [(role, slice)], one per cond."""
        return y

    def level(self, cfg, weight, run):
        """The cfg of this evaluation in place of `cfg`; 1 spares the negative."""
        return cfg

    def instead(self, call, weight):
        """D in place of this evaluation, which then asks the network nothing; None to go on."""
        return None

    def observe(self, call, weight):
        """Sees the predictions of this evaluation before they are combined."""

    def reshape(self, difference, positive, call, weight):
        """d' from d; may be another node's edit of both predictions that comes in."""
        return difference

    def scale(self, w, difference, call, weight):
        """The weight of d in place of `w`: a number or a tensor [B, 1, ...]."""
        return w

    def add(self, call, extra, weight):
        """What is added to the guided D, from `call.predictions` and one D per branch; None for nothing."""
        return None

    def transform(self, denoised, call, weight):
        """D in place of the guided D."""
        return denoised

    def traces(self, call):
        """True where `energy` needs the graph of this evaluation, `Call.graph`."""
        return False

    def energy(self, denoised, call, weight):
        """What is added to D; all energies see the same D, so that they add. None for nothing."""
        return None

    def constrain(self, denoised, call, weight):
        """D in place of D, after the energies."""
        return denoised

    def step(self, denoised, call, weight):
        """The D to hand to the sampler."""
        return denoised


@dataclass(frozen=True)
class Away(Term):
    """s (D_positive - D_branch) for the one branch of the term: away from a worse prediction."""

    s: float = 3.0

    def check(self):
        number("scale", self.s)

    @property
    def off(self):
        return super().off or self.s == 0.0

    def add(self, call, extra, weight):
        return (call.predictions["positive"] - extra[0]) * (self.s * weight)


# a term that overrides one of these works only where the guider's result is CFG of positive and negative
PAIRWISE = ("level", "observe", "reshape", "scale", "transform", "step")


def number(name, value, low=0.0, high=math.inf):
    """`value`, if it is a finite number between `low` and `high`; ValueError otherwise."""
    if not (math.isfinite(value) and low <= value <= high):
        upto = f" to {high:g}" if high < math.inf else ""
        raise ValueError(f"{name} {value} must be a finite number from {low:g}{upto}.")
    return value


def overrides(term, place):
    return getattr(type(term), place) is not getattr(Term, place)


@contextmanager
def blame(term):
    """Puts the node's name before what is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{term.node}: {error}") from None


def steer(model, term):
    """A clone of `model` (a ModelPatcher) that also carries `term`; ValueError where the term cannot act on it."""
    from .run import install

    model = model.clone()
    with blame(term):
        term.check()
    if not term.off:
        with blame(term):
            term.branches(model)
            term.attention(model)
            term.features(model)
            term.after(model)
        model.model_options[STACK] = (*model.model_options.get(STACK, ()), term)
        if term.uses():
            model.set_additional_models(STACK, [*model.get_additional_models_with_key(STACK), *term.uses()])
        install(model)
    return model


def with_roles(model_options, roles):
    return {**model_options, "transformer_options": {**model_options["transformer_options"], ROLES: tuple(roles)}}


def in_order(model_options):
    """The terms of a model, sorted, so that floating point sums do not depend on the order of the nodes."""
    return sorted(model_options.get(STACK, ()), key=lambda term: (term.rank, type(term).__name__, repr(term)))
