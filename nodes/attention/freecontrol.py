from comfy_api.latest import io

from ...patches.attention import freecontrol
from .. import inputs


class FreeControl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerFreeControl",
            display_name="FreeControl: Spatial Control by Semantic Axes",
            category="steer/attention",
            description="Gives new pictures the layout of a guide picture (a photo, a drawing, a rendering); looks "
            "come from the prompt and the seed. The guide decides in a few principal axes of the model's features, the "
            "picture in all others. No training, no ControlNet.",
            search_aliases=[
                "FreeControl", "spatial control", "structure guidance", "training-free ControlNet", "semantic basis",
                "PCA of self-attention", "layout",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the guide was inverted: a UNet, or a DiT."),
                inputs.trajectory(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="subspace: share of the guide's coordinates, at most 1. gradient: length of the push in "
                    "each step, 1 to 3. Higher follows the guide more closely, too high breaks the picture. 0 is off.",
                ),
                io.Int.Input(
                    "components",
                    default=64,
                    min=1,
                    max=65536,
                    tooltip="Principal axes in which the guide decides. Fewer pass on the coarse layout alone, more "
                    "also outlines and in the end its looks; with more than the features have, subspace is "
                    "Plug-and-Play.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(freecontrol.METHODS),
                    tooltip="subspace: the guide's coordinates in place of the picture's; no gradients, little memory. "
                    "gradient: the paper's guidance; a forward and a backward more per step, and the activations "
                    "of a forward in memory.",
                ),
                inputs.layers("look at the features in", "the decoder's without the first on UNets, all on DiTs"),
                *inputs.window(0.0, 0.6),
                inputs.source(),
                io.Custom("STEER_TRAJECTORY").Input(
                    "appearance",
                    optional=True,
                    tooltip="For gradient: the path of a picture whose looks are kept, from SteerRecordTrajectory with "
                    "the same prompt, noise and sigmas and without this node.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Sample it from any noise, with SteerInvert's sigmas."),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, strength, components, method, layers, start_percent, end_percent, source=None,
        appearance=None,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(
            freecontrol.apply(model, trajectory, strength, components, layers, method, schedule, source, appearance)
        )


NODES = [FreeControl]
