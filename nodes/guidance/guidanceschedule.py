from comfy_api.latest import io

from ...patches.guidance import guidanceschedule
from .. import inputs


class GuidanceWeightSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerGuidanceSchedule",
            display_name="Guidance Weight Schedule",
            category="steer/guidance",
            description="Another cfg in every step: low outside the window, up to high inside it, in place of the "
            "sampler's cfg. Little guidance while the layout forms keeps seeds different, little at the end keeps "
            "fine detail. With low 1 the steps outside the window cost half.",
            search_aliases=[
                "limited interval", "guidance interval", "cfg schedule", "dynamic cfg", "TV-CFG", "weak-strong-weak",
                "stage-wise", "CFGOverride",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any model that is sampled with a negative."),
                io.Float.Input(
                    "low",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The cfg where the schedule is 0 and outside the window. Higher guides these steps too; "
                    "at 1 they need no negative and cost half.",
                ),
                io.Float.Input(
                    "high",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The cfg where the schedule is 1. Higher follows the prompt more. With stage-wise, "
                    "2 x cfg - 1 guides as much on average as a constant cfg.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(guidanceschedule.PRESETS),
                    default="limited interval",
                    tooltip="limited interval: high at middle noise levels, as the paper found for SDXL. stage-wise: "
                    "rises in a line to the middle, then falls. weak-strong-weak: the same as a smooth bump. custom: "
                    "window and curve below alone. The others are multiplied by them.",
                ),
                *inputs.window(),
                inputs.curve("the way from low to high"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, low, high, preset, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(guidanceschedule.apply(model, low, high, preset, schedule))


NODES = [GuidanceWeightSchedule]
