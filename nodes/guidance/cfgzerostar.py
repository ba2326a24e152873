from comfy_api.latest import io

from ...patches.guidance import cfgzerostar
from .. import inputs


class CFGZeroStar(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerCFGZeroStar",
            display_name="CFG-Zero*",
            category="steer/guidance",
            description="For flow models (Flux, SD3, Wan, Qwen-Image): scales the negative prediction to fit the "
            "positive before cfg, and stands still in the first steps, where the flow is least certain. These steps "
            "cost nothing.",
            search_aliases=["CFG-Zero*", "CFGZero", "CFG Zero Star", "zero init", "optimized scale"],
            inputs=[
                io.Model.Input("model", tooltip="Made for flow models sampled with a cfg above 1; runs on any."),
                io.Float.Input(
                    "zero_init",
                    default=0.04,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that stand still at the start, at least one. Higher skips more: 0.04 "
                    "(paper) is one step of 20, two of 50. 0 skips none and only scales.",
                ),
                *inputs.window(),
                inputs.curve("how much of the scaling replaces plain CFG"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, zero_init, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(cfgzerostar.apply(model, zero_init, schedule))


NODES = [CFGZeroStar]
