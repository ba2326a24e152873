from comfy_api.latest import io

from ...patches.hspace import injectfusion
from .. import inputs


class InjectFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerInjectFusion",
            display_name="InjectFusion: Content Injection in h-space",
            category="steer/hspace",
            description="Puts the content of one picture (face, expression, glasses) into another that keeps its "
            "colours and surroundings, by mixing the features at the bottom of the UNet. Start the sampler from the "
            "other picture's inverted noise and take SteerAsymmetricSampler, which makes the paper's step; other "
            "samplers show a weaker version.",
            search_aliases=[
                "training-free content injection", "DiffStyle", "h-space", "content injection", "style transfer",
                "face mix",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A UNet (SD1.x, SD2.x, SDXL)."),
                io.Custom("STEER_TRAJECTORY").Input(
                    "content",
                    tooltip="The picture whose content goes in: the trajectory that SteerInvert found with the "
                    "sampler's steps. One picture for all of a batch, or one for each.",
                ),
                io.Float.Input(
                    "gamma",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the content. Higher takes over more of it; above about 0.6 the picture degrades. "
                    "0 is off.",
                ),
                *inputs.window(0.0, 0.6),
                io.Combo.Input(
                    "mode",
                    options=list(injectfusion.MODES),
                    tooltip="slerp: the paper's, along the arc from one to the other, which keeps the size of the "
                    "features. lerp: straight. add: the content on top. replace: all of it, whatever gamma is.",
                    advanced=True,
                ),
                io.String.Input(
                    "layers",
                    default="middle",
                    tooltip='Where to mix: "middle" is the h-space. "output.0-2" mixes the decoder\'s blocks too: more '
                    "blocks take over more of the layout, and of the colours.",
                    advanced=True,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to inject, painted on the picture that is sampled. White takes the content, black "
                    "keeps the original; the h-space is coarse, so edges are soft.",
                ),
                io.Conditioning.Input(
                    "source",
                    optional=True,
                    tooltip="Prompt of the content picture, in place of the one it was inverted with.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to a guider.")],
        )

    @classmethod
    def execute(
        cls, model, content, gamma, start_percent, end_percent, mode, layers, mask=None, source=None
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(injectfusion.apply(model, content, gamma, schedule, mode, layers, mask, source))


NODES = [InjectFusion]
