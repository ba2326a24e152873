from comfy_api.latest import io

from ...patches.guidance import pag
from .. import inputs


class PerturbedAttentionGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerPAG",
            display_name="Perturbed-Attention Guidance",
            category="steer/guidance",
            description="Sharper structure and fewer broken shapes: pushes each step away from what the same model "
            "draws when its self-attention is switched to the identity. Works with any sampler, with and without "
            "CFG. Costs part of one more row of the batch.",
            search_aliases=["PAG", "perturbed attention", "self-attention guidance", "structure"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.x, SD2.x, SDXL, SD3, Flux, Chroma, Lumina 2, Z-Image, Qwen-Image, Wan, HunyuanVideo "
                    "and their kin; others raise an error.",
                ),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How hard to push. Higher gives firmer shapes and more contrast; far above 5 "
                    "oversaturates. 0 is off. Lower the CFG a little when you use it.",
                ),
                inputs.layers("perturb", "the paper's: middle; half depth on DiTs"),
                *inputs.window(),
                inputs.curve("the scale"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, scale, layers, start_percent, end_percent, curve=None) -> io.NodeOutput:
        return io.NodeOutput(pag.apply(model, scale, layers, inputs.schedule(start_percent, end_percent, curve)))


NODES = [PerturbedAttentionGuidance]
