from comfy_api.latest import io

from ...patches.guidance import slg
from .. import inputs


class SkipLayerGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerSLG",
            display_name="Skip-Layer Guidance",
            category="steer/guidance",
            description="Sounder anatomy and composition, on DiT models above all: pushes each step away from what the "
            "same model draws when some of its blocks are left out. Works with any sampler, with and without CFG. "
            "Costs part of one more row of the batch, in its window only.",
            search_aliases=["SLG", "STG", "skip layer", "spatiotemporal skip guidance", "anatomy", "hands"],
            inputs=[
                io.Model.Input("model", tooltip="A model whose blocks Steer knows; others raise an error."),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How hard to push. Higher gives firmer shapes; too high burns and simplifies. 0 is off.",
                ),
                inputs.layers("leave out", "Stable Diffusion 3.5's double.7-9 there; the page lists the others"),
                *inputs.window(0.01, 0.2),
                inputs.curve("the scale"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, scale, layers, start_percent, end_percent, curve=None) -> io.NodeOutput:
        return io.NodeOutput(slg.apply(model, scale, layers, inputs.schedule(start_percent, end_percent, curve)))


NODES = [SkipLayerGuidance]
