"""Inputs that all energies share, with one wording."""

from comfy_api.latest import io

from ..patches.shared.energy import GRADIENTS, NORMS
from . import inputs


def strength(of, default=1.0):
    return io.Float.Input(
        "strength",
        default=default,
        min=0.0,
        max=1000.0,
        step=0.05,
        tooltip=f"How far each step moves its estimate {of}: with norm unit in standard deviations of it, times the "
        "share that is still open. Higher follows it more closely, too high breaks the picture. 0 is off.",
    )


def how(start=0.0, end=1.0, recurrence=1):
    """How an energy moves the estimate, and when."""
    return [
        io.Combo.Input(
            "gradient",
            options=list(GRADIENTS),
            default=GRADIENTS[0],
            tooltip="estimate: the slope at the clean estimate; any model, quantised too, no second look of the "
            "network. network: the slope through the network, about twice the time and much memory; it knows better "
            "how the picture can change.",
        ),
        io.Combo.Input(
            "norm",
            options=list(NORMS),
            default=NORMS[0],
            tooltip="unit: only the direction of the slope counts, so that one strength works everywhere. none: its "
            "size too, as in the formulas of the papers; the strength then depends on what is measured.",
            advanced=True,
        ),
        every(),
        io.Int.Input(
            "recurrence",
            default=recurrence,
            min=1,
            max=100,
            tooltip="Steps down the slope at each evaluation. Higher goes further along a bent way, and costs a look "
            "each; the network is not asked again.",
            advanced=True,
        ),
        *inputs.window(start, end),
    ]


def every():
    return io.Int.Input(
        "every",
        default=1,
        min=1,
        max=1000,
        tooltip="Acts at every n-th step. Higher costs less, and does less.",
        advanced=True,
    )


def vae():
    return io.Vae.Input(
        "vae",
        tooltip="The model's VAE, or a TAESD of its kind, which is faster: the estimate of each step is decoded with "
        "it, and the slope goes back through it.",
    )


def more(of):
    """The optional inputs."""
    return [inputs.where(of), inputs.curve("the strength")]


def model():
    return io.Model.Input("model", tooltip="Any model. For gradient network: one that is not quantised.")


def output():
    return io.Model.Output(tooltip="The model, steered. Any sampler.")
