from comfy_api.latest import io

from ...patches.guidance import sag
from .. import inputs


class SelfAttentionGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerSAG",
            display_name="Self-Attention Guidance",
            category="steer/guidance",
            description="More detail where the model looks: blurs the picture there, asks again and pushes away from "
            "the answer. For UNet models. Costs one more forward per step, since it needs the first answer.",
            search_aliases=["SAG", "self attention", "adversarial blur", "detail"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet model (SD1.x, SD2.x, SDXL)."),
                io.Float.Input(
                    "scale",
                    default=0.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How hard to push. Higher gives more detail and contrast; far above 1 is noisy. 0 is off.",
                ),
                io.Float.Input(
                    "blur_sigma",
                    default=2.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Blur of the degraded picture, in latent pixels of 8 picture pixels. Higher works on "
                    "coarser detail. 0 is off.",
                ),
                *inputs.window(),
                inputs.curve("the scale"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, scale, blur_sigma, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(sag.apply(model, scale, blur_sigma, schedule))


NODES = [SelfAttentionGuidance]
