from comfy_api.latest import io

from ...patches.guidance import autoguidance
from .. import inputs


class AutoGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerAutoGuidance",
            display_name="AutoGuidance",
            category="steer/guidance",
            description="Guides a model with a bad version of itself: pushes away from what a weaker model says of the "
            "same prompt. Sharper and more real without losing variety; with and without CFG. The weaker one is an "
            "earlier or smaller checkpoint, or the same model weakened by a LoRA or by perturbed layers. One more "
            "forward, of the weaker model.",
            search_aliases=["AutoGuidance", "bad version of itself", "weak model", "DualModelGuider", "guide"],
            inputs=[
                io.Model.Input("model", tooltip="The good model."),
                io.Model.Input(
                    "weak_model",
                    tooltip="A worse model of the same architecture, latent and text encoder. Of the same loader it "
                    "must differ in something: a LoRA (needs a second copy in memory) or another node's patch "
                    "(needs none).",
                ),
                io.Float.Input(
                    "scale",
                    default=1.1,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How hard to push away from the weak model: the paper's w - 1 (w 2.1). Higher is "
                    "crisper, too high overshoots. 0 is off.",
                ),
                *inputs.window(),
                inputs.curve("the scale"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, weak_model, scale, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(autoguidance.apply(model, weak_model, scale, schedule))


NODES = [AutoGuidance]
