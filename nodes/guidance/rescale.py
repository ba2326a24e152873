from comfy_api.latest import io

from ...patches.guidance import rescale
from .. import inputs


class GuidanceRescale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerRescale",
            display_name="Guidance Rescale",
            category="steer/guidance",
            description="Brings the contrast of the guided prediction back to that of the positive alone, against "
            "overexposed and overcontrasted pictures at high cfg. Right on eps, v and flow models. Costs nothing.",
            search_aliases=["RescaleCFG", "cfg rescale", "guidance rescale", "overexposure", "zero terminal SNR"],
            inputs=[
                io.Model.Input("model", tooltip="Any model sampled with a cfg above 1."),
                io.Float.Input(
                    "amount",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the contrast is brought back. Higher is flatter; 0.7 is the paper's, 1 can "
                    "look plain, 0 is off.",
                ),
                *inputs.window(),
                inputs.curve("the amount"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, amount, start_percent, end_percent, curve=None) -> io.NodeOutput:
        return io.NodeOutput(rescale.apply(model, amount, inputs.schedule(start_percent, end_percent, curve)))


NODES = [GuidanceRescale]
