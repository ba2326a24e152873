from comfy_api.latest import io

from ...patches.guidance import negative
from .. import inputs


class SubtractiveNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerNegative",
            display_name="Subtractive Negative Prompt (Composable Diffusion)",
            category="steer/guidance",
            description="A negative prompt with a strength of its own, subtracted from what the sampler does with "
            "positive and negative. Several nodes push away from several things, each as hard and in the steps you "
            "choose. Leave the sampler's negative empty. Costs one more row of the batch for each.",
            search_aliases=[
                "negative prompt", "subtractive negative", "negation", "composable diffusion", "AND NOT",
                "negative strength", "PerpNeg",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any model that is sampled with a negative."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="What to push away from: a prompt of the same text encoder. May have areas, masks, "
                    "timestep ranges and ControlNets of its own.",
                ),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How hard to push away. Higher removes more, and above the cfg burns. At cfg - 1 it is "
                    "the same as this prompt in the sampler's negative. 0 is off.",
                ),
                *inputs.window(),
                inputs.curve("the scale"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, conditioning, scale, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(negative.apply(model, conditioning, scale, schedule))


NODES = [SubtractiveNegative]
