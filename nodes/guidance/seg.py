from comfy_api.latest import io

from ...patches.guidance import seg
from .. import inputs


class SmoothedEnergyGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerSEG",
            display_name="Smoothed Energy Guidance",
            category="steer/guidance",
            description="Better structure, gentler than PAG: pushes each step away from what the same model draws when "
            "its self-attention sees a blurred picture. Works with any sampler, with and without CFG. Costs part of "
            "one more row of the batch.",
            search_aliases=["SEG", "smoothed energy", "blurred attention", "structure"],
            inputs=[
                io.Model.Input("model", tooltip="A model whose self-attention Steer knows; others raise an error."),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How hard to push. Higher gives firmer structure and more contrast. 0 is off.",
                ),
                io.Float.Input(
                    "blur_sigma",
                    default=100.0,
                    min=0.0,
                    max=seg.MEAN,
                    step=1.0,
                    tooltip="How far queries are blurred over the picture, in attention tokens. Higher weakens the "
                    "compared prediction more and so pushes harder; 1000 is the paper's infinity, every query the "
                    "mean. 0 is off.",
                ),
                inputs.layers("blur", "the paper's: middle"),
                *inputs.window(),
                inputs.curve("the scale"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, scale, blur_sigma, layers, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(seg.apply(model, scale, blur_sigma, layers, schedule))


NODES = [SmoothedEnergyGuidance]
