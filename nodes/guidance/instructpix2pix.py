from comfy_api.latest import io

from ...patches.guidance import instructpix2pix
from .. import inputs


class InstructPix2Pix(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerInstructPix2Pix",
            display_name="InstructPix2Pix Guidance",
            category="steer/guidance",
            description="For models that edit an image by an instruction: one scale for staying with the image (here) "
            "and one for following the instruction (the sampler's cfg). Positive and negative both carry the image. "
            "Costs one more row of the batch.",
            search_aliases=["IP2P", "dual cfg", "image guidance", "image cfg", "Kontext", "edit", "DualCFGGuider"],
            inputs=[
                io.Model.Input("model", tooltip="An InstructPix2Pix model, or one that takes reference latents."),
                io.Float.Input(
                    "image_scale",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="The paper's s_I. Higher stays closer to the image, lower lets it change more; raise it "
                    "when the edit destroys the picture. 1 is off: plain CFG.",
                ),
                *inputs.window(),
                inputs.curve("image_scale - 1"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, image_scale, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(instructpix2pix.apply(model, image_scale, schedule))


NODES = [InstructPix2Pix]
