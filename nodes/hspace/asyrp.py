from comfy_api.latest import io

from ...patches.hspace import asyrp
from .. import inputs


class Asyrp(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerAsyrp",
            display_name="Asyrp: Directions in h-space",
            category="steer/hspace",
            description="Adds a direction to the features at the bottom of the UNet, so that a picture gets glasses or "
            "a smile and keeps the rest. Several in a row add up. Take SteerAsymmetricSampler, which makes the paper's "
            "step; other samplers show a weaker version.",
            search_aliases=[
                "semantic latent space", "asymmetric reverse process", "h-space", "slider", "attribute editing",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The UNet with which the direction was found."),
                io.Custom("STEER_DIRECTION").Input(
                    "direction", tooltip="From SteerHSpaceDirection or SteerHSpaceDirectionOfPictures."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How often the direction is added. Higher shows more of it and, in the end, artefacts; "
                    "below 0 leads the other way. 0 is off.",
                ),
                *inputs.window(0.0, 0.6),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to a guider.")],
        )

    @classmethod
    def execute(cls, model, direction, strength, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(asyrp.apply(model, direction, strength, inputs.schedule(start_percent, end_percent)))


NODES = [Asyrp]
