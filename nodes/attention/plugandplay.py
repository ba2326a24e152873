from comfy_api.latest import io

from ...patches.attention import plugandplay
from .. import inputs


class PlugAndPlay(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerPlugAndPlay",
            display_name="Plug-and-Play Diffusion Features",
            category="steer/attention",
            description="Keeps the layout and the shapes of a source picture while the prompt gives it other colours, "
            "materials or another style: who attends to whom, and coarse features of the decoder, are the source's.",
            search_aliases=[
                "PnP", "plug and play", "structure preserving", "image to image translation", "feature injection",
                "self-attention injection", "layout",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the picture was inverted: a UNet, or a DiT."),
                inputs.trajectory(),
                inputs.layers("take the source's queries and keys in", "the decoder's without the first on UNets, "
                "which is the paper's output.4-11; all on DiTs"),
                *inputs.window(0.0, 0.5),
                io.String.Input(
                    "features",
                    default="auto",
                    tooltip='Decoder blocks whose ResBlock is the source\'s: "auto" (the second that attends, which is '
                    'the paper\'s output.4; none on DiTs), or names as in layers. More blocks hold more of the source, '
                    "in the end its colours.",
                    advanced=True,
                ),
                io.Float.Input(
                    "features_start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where the features begin, as a share of the sampling range: 0 is the first step. Higher "
                    "leaves the early steps, which decide the layout, as they were.",
                    advanced=True,
                ),
                io.Float.Input(
                    "features_end_percent",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where the features end: 1 is the last step. Higher keeps more of the source's shapes. 0 "
                    "leaves the features as they are.",
                    advanced=True,
                ),
                inputs.source(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Sample it from the noise and sigmas of SteerInvert."),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, layers, start_percent, end_percent, features, features_start_percent,
        features_end_percent, source=None,
    ) -> io.NodeOutput:
        schedules = (
            inputs.schedule(start_percent, end_percent),
            inputs.schedule(features_start_percent, features_end_percent),
        )
        return io.NodeOutput(
            plugandplay.apply(model, trajectory, layers, schedules[0], features, schedules[1], source)
        )


NODES = [PlugAndPlay]
