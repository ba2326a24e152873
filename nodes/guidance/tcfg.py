from comfy_api.latest import io

from ...patches.guidance import tcfg
from .. import inputs


class TangentialDampingCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerTCFG",
            display_name="Tangential Damping CFG",
            category="steer/guidance",
            description="Takes out of the negative prediction what does not point where positive and negative agree, "
            "before cfg pushes away from it. Costs nothing.",
            search_aliases=["TCFG", "tangential damping", "tangential classifier-free guidance", "SVD guidance"],
            inputs=[
                io.Model.Input("model", tooltip="Any model sampled with a cfg above 1."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the stray part of the negative goes: 1 (paper) all of it, 0 is off.",
                ),
                *inputs.window(),
                inputs.curve("how much of the stray part goes"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, strength, start_percent, end_percent, curve=None) -> io.NodeOutput:
        return io.NodeOutput(tcfg.apply(model, strength, inputs.schedule(start_percent, end_percent, curve)))


NODES = [TangentialDampingCFG]
