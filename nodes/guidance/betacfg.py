from comfy_api.latest import io

from ...patches.guidance import betacfg
from .. import inputs


class BetaCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerBetaCFG",
            display_name="Beta-CFG",
            category="steer/guidance",
            description="Guidance of one size in every step, whatever the prompt, rising and falling over the run as a "
            "beta distribution: weak at both ends, strong in the middle. The sampler's cfg says how strong. Costs "
            "nothing.",
            search_aliases=["beta-CFG", "β-CFG", "adaptive scaling", "dynamic cfg", "normalized guidance"],
            inputs=[
                io.Model.Input("model", tooltip="Any model sampled with a cfg above 1."),
                io.Float.Input(
                    "a",
                    default=2.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Shape of the rise. Higher moves the guidance to later steps; 1 begins at full strength.",
                ),
                io.Float.Input(
                    "b",
                    default=2.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Shape of the fall. Higher moves the guidance to earlier steps; 1 never falls. a = b = 1 "
                    "is the same in every step.",
                ),
                io.Float.Input(
                    "gamma",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How far the size of the guidance is evened out. 1 (paper) makes it the same in every "
                    "step, 0 leaves it as cfg has it, higher turns around which steps are strong.",
                ),
                io.Boolean.Input(
                    "keep_conditional",
                    default=False,
                    tooltip="Off (paper): steps without guidance follow the negative. On: they follow the positive, so "
                    "the prompt is kept from the first step to the last.",
                ),
                *inputs.window(),
                inputs.curve("how much of it replaces plain CFG"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(
        cls, model, a, b, gamma, keep_conditional, start_percent, end_percent, curve=None
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(betacfg.apply(model, a, b, gamma, keep_conditional, schedule))


NODES = [BetaCFG]
