"""The stack of terms a MODEL carries, and what a term is.

A term is a frozen value. It says which predictions it needs beside the host's own, and changes the combination of
predictions at fixed places, in this order whatever the order of the nodes:

    reshape   d = D_positive - D_negative          (APG)
    scale     the guidance weight w                (CFG++)
    add       D = D_negative + w d + ...           (PAG)
    step      D as the sampler gets it             (CFG++)

Predictions are clean estimates D(x, sigma), in the latent space in which the model works, [B, C, ...] of any rank.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from .attention import Edit
from .layers import Layer
from .schedule import Schedule

STACK = "steer"  # in model_options: the tuple of terms
# in transformer_options, for the time of one sampling run, one evaluation, one batch of conds:
RUN, CALL, ROLES = "steer.run", "steer.call", "steer.roles"


@dataclass(frozen=True)
class Weak:
    """The positive conditioning through a perturbed network: self-attention of `layers` goes through `edit`.

    Equal branches are one prediction, whichever nodes ask for it.
    """

    name: str
    edit: Edit
    layers: tuple[Layer, ...]

    def __str__(self):
        return f"weak:{self.name}[{', '.join(map(str, self.layers))}]"


@dataclass(frozen=True)
class Term:
    """One piece of steering; a method overrides the places it changes.

    `weight` is the schedule's at this step; while it is 0 a term is not asked. Each item of the batch is treated by
    itself. `call` is the `run.Call` of this evaluation: x, sigma, predictions as the network gave them, the run.
    """

    schedule: Schedule = Schedule()
    node: ClassVar[str]  # id of the node, for messages
    needs_negative: ClassVar[bool] = False  # also where the sampler's cfg is 1
    exclusive: ClassVar[bool] = False  # two of it at the same time have no meaning

    @property
    def off(self):
        """True when the term cannot change anything in any run."""
        return self.schedule.closed

    def prepare(self, run):
        """Checks the term against model, sampler and sigmas before the first step; raises ValueError."""

    def branches(self, model):
        """The `Weak` predictions it needs while it is active, on this ModelPatcher; raises ValueError."""
        return ()

    def reshape(self, difference, positive, call, weight):
        """d' from d; may be another node's edit of both predictions that comes in."""
        return difference

    def scale(self, w):
        """The guidance weight in place of the sampler's `w`."""
        return w

    def add(self, positive, weak, weight):
        """What is added to the guided D, from D_positive and one D per branch; None for nothing."""
        return None

    def step(self, denoised, call):
        """The D to hand to the sampler."""
        return denoised


# a term that overrides one of these works only where the guider's result is CFG of positive and negative
PAIRWISE = ("reshape", "scale", "step")


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
    if not term.off:
        with blame(term):
            term.branches(model)
        model.model_options[STACK] = (*model.model_options.get(STACK, ()), term)
        install(model)
    return model


def in_order(model_options):
    """The terms of a model, sorted, so that floating point sums do not depend on the order of the nodes."""
    return sorted(model_options.get(STACK, ()), key=lambda term: (type(term).__name__, repr(term)))
