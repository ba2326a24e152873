from comfy_api.latest import io

from ...patches.tokens import personalizeanything
from .. import inputs


def share(name, tooltip):
    """A share of the picture's side."""
    return io.Float.Input(name, default=0.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


class PersonalizeAnything(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerPersonalizeAnything",
            display_name="Personalize Anything",
            category="steer/tokens",
            description="Puts the subject of an inverted picture into a new one, where you want it: early in the run "
            "its tokens stand in place of the picture's own, later the picture only looks at them. For Flux and its "
            "kin. Several of these nodes put in several subjects, or a subject and a scene.",
            search_aliases=[
                "token replacement", "subject driven", "personalization", "same character", "identity", "move subject",
                "layout guided", "multi subject", "inpaint", "outpaint", "training-free",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the picture was inverted: Flux, Chroma."),
                inputs.trajectory(),
                io.Mask.Input(
                    "subject_mask",
                    tooltip="Where the subject is in its own picture: white is taken. A token (16 pixels on Flux) is "
                    "taken when half of it is white.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the sampling range in which the subject's tokens replace the picture's own. "
                    "Higher is more like the subject, lower obeys the prompt more. 0.9 for in- and outpainting.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="After that: how much the picture looks at the subject's tokens beside its own. Higher is "
                    "more like the subject; 0 leaves it alone.",
                ),
                share("x", "Left edge of the box to put the subject in, as a share of the picture's width. Higher is "
                           "further to the right."),
                share("y", "Upper edge of the box, as a share of the height. Higher is further down."),
                share("width", "Width of the box; 0 is no box: the subject stays in its place, or goes to target_mask. "
                               "Higher is wider."),
                share("height", "Height of the box; 0 is no box. Higher is taller."),
                io.Combo.Input(
                    "size",
                    options=list(personalizeanything.SIZES),
                    tooltip="own size: the subject stands in the middle of the box as it is. fit the box: it is made "
                    "larger or smaller to fill the box, its aspect kept; own size is the more faithful.",
                ),
                io.Float.Input(
                    "perturbation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the subject's 3 x 3 patches of tokens that are shuffled at each step; above 0 "
                    "its edge varies by one token, too. Higher copies pose and texture less.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of the perturbation; without it, it does nothing.",
                ),
                inputs.grow(advanced=True),
                inputs.layers("replace and look in", "all"),
                *inputs.window(),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="Where the subject may be in the new picture: it goes to the middle of what is white, and "
                    "nowhere else. With a box, the box says where it goes.",
                ),
                inputs.source(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, steered. Sample it from any noise, at the size of the subject's picture."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, subject_mask, threshold, strength, x, y, width, height, size, perturbation, seed, grow,
        layers, start_percent, end_percent, target_mask=None, source=None,
    ) -> io.NodeOutput:
        box = (x, y, width, height) if width and height else None
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(
            personalizeanything.apply(
                model, trajectory, subject_mask, threshold, strength, schedule, layers, box, size, target_mask,
                perturbation, grow, seed, source,
            )
        )


NODES = [PersonalizeAnything]
