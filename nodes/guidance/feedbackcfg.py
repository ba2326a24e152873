from comfy_api.latest import io

from ...patches.guidance import feedbackcfg
from .. import inputs


class FeedbackCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerFeedbackCFG",
            display_name="Dynamic Classifier-Free Guidance via Online Feedback",
            category="steer/guidance",
            description="Chooses the cfg of every step by itself, for each picture: the strongest that follows the "
            "prompt without driving contrast away from an unguided picture's. In place of the sampler's cfg. Costs "
            "nothing. Its own scores are simple ones, not the paper's trained evaluators; a scorer judges pictures.",
            search_aliases=["dynamic cfg", "automatic cfg", "online feedback", "adaptive cfg", "Feedback CFG"],
            inputs=[
                io.Model.Input("model", tooltip="Any model that is sampled with a negative."),
                io.Float.Input(
                    "low",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="The smallest cfg it may choose. Higher forces guidance on every step.",
                ),
                io.Float.Input(
                    "high",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="The largest cfg it may choose. Higher lets late steps, where guidance is small, be "
                    "pushed harder.",
                ),
                io.Int.Input(
                    "candidates",
                    default=14,
                    min=2,
                    max=1000,
                    tooltip="How many values between low and high it compares. More is finer and costs nothing "
                    "noticeable.",
                    advanced=True,
                ),
                io.Float.Input(
                    "fidelity",
                    default=0.5,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How much natural contrast counts against following the prompt. Higher chooses smaller "
                    "cfgs; 0 always takes high.",
                ),
                *inputs.window(),
                io.Custom("STEER_SCORER").Input(
                    "scorer",
                    optional=True,
                    tooltip="Judges the estimate of every candidate, in place of the simple score of following the "
                    "prompt. Each candidate is decoded and judged in each step: take fewer of them.",
                ),
                inputs.curve("how much of the chosen cfg replaces the sampler's"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(
        cls, model, low, high, candidates, fidelity, start_percent, end_percent, scorer=None, curve=None
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(feedbackcfg.apply(model, low, high, candidates, fidelity, schedule, scorer))


NODES = [FeedbackCFG]
