from comfy_api.latest import io

from ...patches.guidance import tag
from .. import inputs


class TangentialAmplifyingGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerTAG",
            display_name="Tangential Amplifying Guidance",
            category="steer/guidance",
            description="Lengthens the part of each step that changes what is seen and leaves the part that only "
            "removes noise. Needs no negative, works with or without cfg, costs nothing.",
            search_aliases=["TAG", "tangential guidance", "hallucination", "unconditional guidance"],
            inputs=[
                io.Model.Input("model", tooltip="Any model."),
                io.Float.Input(
                    "scale",
                    default=0.15,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="The paper's eta - 1. Higher moves further along the content in each step: more contrast "
                    "and structure, then burnt. Papers' values: 0.15 SD1.5 and 2.1, 0.2 SDXL, 0.05 SD3. 0 is off.",
                ),
                *inputs.window(),
                inputs.curve("the scale"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler, BasicGuider or CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, scale, start_percent, end_percent, curve=None) -> io.NodeOutput:
        return io.NodeOutput(tag.apply(model, scale, inputs.schedule(start_percent, end_percent, curve)))


NODES = [TangentialAmplifyingGuidance]
