from comfy_api.latest import io

from ...patches.guidance import adaptiveguidance
from .. import inputs


class AdaptiveGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerAdaptiveGuidance",
            display_name="Adaptive Guidance",
            category="steer/guidance",
            description="Faster CFG: watches how alike the predictions of positive and negative are, and leaves the "
            "negative out once they agree. Nearly the same picture for a quarter less work or better. Each picture "
            "of a batch is judged by itself.",
            search_aliases=["AG", "adaptive guidance", "speed", "skip uncond", "cfg cutoff"],
            inputs=[
                io.Model.Input("model", tooltip="Any model that is sampled with a cfg above 1."),
                io.Float.Input(
                    "threshold",
                    default=0.991,
                    min=-1.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="How alike the predictions must be (cosine) before the negative is left out for the rest "
                    "of the run. Higher guides longer and saves less; 1 is off.",
                ),
                *inputs.window(),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, threshold, start_percent, end_percent) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(adaptiveguidance.apply(model, threshold, schedule))


NODES = [AdaptiveGuidance]
