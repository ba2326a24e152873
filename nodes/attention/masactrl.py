from comfy_api.latest import io

from ...patches.attention import masactrl
from .. import inputs


class MasaCtrl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerMasaCtrl",
            display_name="MasaCtrl: Mutual Self-Attention Control",
            category="steer/attention",
            description="Lets a picture change its pose, place or shape and keep its looks: the layout comes from the "
            "new prompt, colours and textures are asked of the source picture, which runs beside it.",
            search_aliases=[
                "mutual self-attention", "non-rigid editing", "consistent character", "pose change", "shared keys",
                "reference attention",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the picture was inverted: a UNet or a DiT."),
                inputs.trajectory(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the source's keys and values; the rest is the picture's own. Higher looks more "
                    "like the source. 0 is off.",
                ),
                inputs.layers("take the source's keys and values in", "the decoder's from half the resolution on "
                "UNets, which are the paper's; the later half on DiTs"),
                *inputs.window(0.08, 1.0),
                inputs.source(),
                io.Mask.Input(
                    "source_mask",
                    optional=True,
                    tooltip="Where the foreground is in the source. With target_mask, foreground asks foreground and "
                    "background asks background, so that they are not confused.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="Where the foreground shall be in the new picture; goes with source_mask.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Sample it from the noise and sigmas of SteerInvert."),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, strength, layers, start_percent, end_percent, source=None, source_mask=None,
        target_mask=None,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(
            masactrl.apply(model, trajectory, strength, layers, schedule, source, source_mask, target_mask)
        )


NODES = [MasaCtrl]
