from comfy_api.latest import io

from ...patches.guidance import apg
from .. import inputs


class AdaptiveProjectedGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerAPG",
            display_name="Adaptive Projected Guidance",
            category="steer/guidance",
            description="High CFG without burnt colours: takes the part of the guidance that only makes the picture "
            "more saturated away, limits its size, and turns against directions already taken. Costs nothing. "
            "Raise the sampler's cfg with it (8 to 15).",
            search_aliases=["APG", "projected guidance", "oversaturation", "high cfg", "momentum"],
            inputs=[
                io.Model.Input("model", tooltip="Any model sampled with a cfg above 1."),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the saturating part of the guidance stays. 0 (paper) removes it, 1 keeps it "
                    "as plain CFG does, higher exaggerates it.",
                ),
                io.Float.Input(
                    "norm_threshold",
                    default=15.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="Largest size of the guidance in one step; longer ones are shortened to it. Lower is "
                    "gentler. It grows with the latent: the paper's 15 is for SDXL at 1024 px, half of it fits 512 px, "
                    "0.75 the lab model. 0 is no limit.",
                ),
                io.Float.Input(
                    "momentum",
                    default=-0.5,
                    min=-0.99,
                    max=0.99,
                    step=0.05,
                    tooltip="Weight of earlier steps in the guidance. Negative (paper -0.5) pushes away from where it "
                    "went already, 0 forgets, positive accumulates.",
                ),
                *inputs.window(),
                inputs.curve("how much of APG replaces plain CFG"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider.")],
        )

    @classmethod
    def execute(
        cls, model, eta, norm_threshold, momentum, start_percent, end_percent, curve=None
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(apg.apply(model, eta, norm_threshold, momentum, schedule))


NODES = [AdaptiveProjectedGuidance]
