"""Inputs that many nodes share, with one wording."""

from comfy_api.latest import io

from ..patches.shared.schedule import Schedule


def window(start=0.0, end=1.0):
    """start_percent and end_percent, as every Steer node has them."""
    return [
        io.Float.Input(
            "start_percent",
            default=start,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where it begins, as a share of the sampling range: 0 is the first step (pure noise). Higher "
            "leaves the early steps, which decide the layout, as they were.",
            advanced=True,
        ),
        io.Float.Input(
            "end_percent",
            default=end,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where it ends: 1 is the last step. Lower leaves the late steps, which decide fine detail, as "
            "they were, and costs nothing there.",
            advanced=True,
        ),
    ]


def layers(verb, auto):
    """Names of layers; `verb` says what happens to them, `auto` what "auto" stands for."""
    return io.String.Input(
        "layers",
        default="auto",
        tooltip=f'Which layers to {verb}: "auto" ({auto}), "middle", "output.3-5", "input.8" on UNets, "double.7-9", '
        '"single" on DiTs, "50%-70%" of the depth, or several with commas. More layers push harder.',
    )


def curve(of):
    """An optional curve of weights, a socket for the host's Curve Editor; `of` says what it weighs."""
    return io.Custom("CURVE").Input(
        "curve",
        optional=True,
        tooltip=f"From a Curve Editor: multiplies {of} over the sampling range, from the first step (left) to the last "
        "(right). 1 changes nothing; where it is 0 the step costs nothing.",
        extra_dict={"forceInput": True},  # the page would draw an editor into every node
    )


def schedule(start_percent, end_percent, curve=None):
    """A Schedule from the inputs above."""
    points = None
    if curve is not None:
        from comfy_api.input import CurveInput

        points = tuple(float(y) for y in CurveInput.from_raw(curve).to_lut(257))
        if all(y == 1.0 for y in points):
            points = None
    return Schedule(start_percent, end_percent, points)


def steps(tooltip, default=30):
    return io.Int.Input("steps", default=default, min=1, max=10000, tooltip=tooltip)


def scheduler(note=""):
    import comfy.samplers

    return io.Combo.Input(
        "scheduler",
        options=comfy.samplers.SCHEDULER_NAMES,
        default="normal",
        tooltip="How the noise levels are spread over the steps." + note,
    )


def sigmas_of(model, scheduler, steps, denoise=1.0):
    """The host's sigmas for a ModelPatcher: the last `steps` of enough steps for the whole range."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, scheduler, max(int(steps / denoise), steps))[-(steps + 1) :].cpu()


def grow(advanced=False):
    return io.Int.Input(
        "grow",
        default=0,
        min=-64,
        max=64,
        tooltip="Cells of the latent (8 pixels or so) by which the region grows. Higher leaves an edit more room "
        "around the mask; negative shrinks it.",
        advanced=advanced,
    )


def feather():
    return io.Int.Input(
        "feather",
        default=0,
        min=0,
        max=64,
        tooltip="Width of the soft edge in cells of the latent, inside the mask: outside of it nothing ever changes. "
        "Higher blends the edit more gently into its surroundings.",
    )


def trajectory():
    return io.Custom("STEER_TRAJECTORY").Input(
        "trajectory", tooltip="From SteerInvert: the path of the source picture from noise, found with this model."
    )


def source():
    return io.Conditioning.Input(
        "source",
        optional=True,
        tooltip="The prompt that describes the source picture; without it, the one it was inverted with.",
    )


def where(of, more=""):
    """A mask of the picture that is drawn."""
    return io.Mask.Input(
        "mask", optional=True, tooltip=f"Where in the new picture {of} counts: 1 is all of it, 0 not at all.{more}"
    )


def weights():
    return io.String.Input(
        "weights",
        tooltip='Words of the new prompt and how much they count: "glasses: 1.5, hat: -0.5". Above 1 more, below 1 '
        "less, below 0 the opposite, while cross_replace lasts. Empty leaves all as they are.",
    )


def source_weights():
    return io.String.Input(
        "source_weights",
        tooltip="As weights, for words of the source prompt: how much of the attention to them is handed on.",
        advanced=True,
    )


def blend(threshold):
    """blend_words, and blend_threshold with its default."""
    return [
        io.String.Input(
            "blend_words",
            tooltip="Words of either prompt, with commas, around which alone the picture may change: where neither "
            "picture attends to them it stays the source. Empty lets all of it change.",
        ),
        io.Float.Input(
            "blend_threshold",
            default=threshold,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="With blend_words: how much attention counts, as a share of the most. Higher leaves a smaller "
            "region to change.",
            advanced=True,
        ),
    ]
