from comfy_api.latest import io

from ...patches.attention import styleinjection
from .. import inputs


class StyleInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerStyleInjection",
            display_name="Style Injection (StyleID)",
            category="steer/attention",
            description="Paints one picture in the style of another, without training: self-attention takes its keys "
            "and values from the style picture, its queries from the content picture. Invert both pictures with the "
            "same steps and an empty prompt, sample with the noise that this node gives, cfg 1 and the sigmas of the "
            "content.",
            search_aliases=[
                "StyleID", "style transfer", "style injection", "AdaIN", "reference style", "neural style",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with which both pictures were inverted: a UNet."),
                io.Custom("STEER_TRAJECTORY").Input(
                    "content", tooltip="From SteerInvert: the picture whose layout stays."
                ),
                io.Custom("STEER_TRAJECTORY").Input(
                    "style",
                    tooltip="From SteerInvert with the same steps: the picture whose colours and textures are taken, "
                    "at the size of the content. One for all of a batch, or one for each.",
                ),
                io.Float.Input(
                    "gamma",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the content's queries. Higher keeps more of its layout, lower takes over more of "
                    "the style; the paper's range is 0.3 to 0.8.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplies the scores of attention. Higher asks fewer places of the style, which is "
                    "sharper; 1 is blurred, as two pictures match worse than one with itself.",
                ),
                inputs.layers("inject in", "the last six of the sixteen of Stable Diffusion, and as many in proportion "
                "on other UNets"),
                *inputs.window(),
                inputs.source(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Wire it to a guider with an empty prompt and cfg 1."),
                io.Noise.Output(
                    tooltip="Where the paper starts: the content's noise with mean and spread of the style's in each "
                    "channel. For SamplerCustomAdvanced, beside the content's latent and sigmas. Take the noise of "
                    "SteerInvert instead to keep the colours of the content.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, content, style, gamma, temperature, layers, start_percent, end_percent, source=None
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(
            *styleinjection.apply(model, content, style, gamma, temperature, layers, schedule, source)
        )


NODES = [StyleInjection]
