from comfy_api.latest import io

from ...patches.guidance import fdg
from .. import inputs


class FrequencyDecoupledGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerFDG",
            display_name="Frequency-Decoupled Guidance",
            category="steer/guidance",
            description="One cfg for layout and colour (low frequencies), another for edges and texture (high): the "
            "detail of a high cfg without its burnt colours. Takes the place of the sampler's cfg.",
            search_aliases=["FDG", "frequency guidance", "FreSca", "low high frequency cfg", "laplacian pyramid"],
            inputs=[
                io.Model.Input("model", tooltip="Any model with a negative."),
                io.Float.Input(
                    "low",
                    default=5.0,
                    min=-20.0,
                    max=100.0,
                    step=0.1,
                    tooltip="cfg of layout, light and colour. Higher follows the prompt more, then saturates; 1 adds "
                    "nothing.",
                ),
                io.Float.Input(
                    "high",
                    default=10.0,
                    min=-20.0,
                    max=100.0,
                    step=0.1,
                    tooltip="cfg of edges and texture. Higher is crisper, then noisy; 1 adds nothing.",
                ),
                io.Int.Input(
                    "levels",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="Where low ends. 1 (paper) calls low what survives halving the latent once; each level "
                    "more halves again, so that more counts as high.",
                    advanced=True,
                ),
                *inputs.window(),
                inputs.curve("how much of it replaces the sampler's cfg"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, low, high, levels, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(fdg.apply(model, low, high, levels, schedule))


NODES = [FrequencyDecoupledGuidance]
