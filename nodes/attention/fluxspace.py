from comfy_api.latest import io

from ...patches.attention import fluxspace
from .. import inputs


class FluxSpace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerFluxSpace",
            display_name="FluxSpace: Disentangled Attribute Editing",
            category="steer/attention",
            description="Adds an attribute (eyeglasses, a smile, age) to what a transformer draws, by a few words and "
            "with a dial: what attention says of the words, less what it says of an empty text, is added where the "
            "words look. Works from any seed without inversion, and on an inverted picture. Several of these nodes add "
            "up.",
            search_aliases=[
                "semantic editing", "attribute editing", "concept slider", "joint attention", "rectified flow editing",
                "Flux edit",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A transformer with joint blocks: Flux, Chroma, SD3, Qwen-Image."),
                io.Clip.Input("clip", tooltip="The text encoder that made the prompt."),
                io.String.Input(
                    "edit",
                    default="",
                    tooltip='What shall be there, in a word or a few: "eyeglasses", "smiling". Not the whole prompt.',
                ),
                io.Float.Input(
                    "fine",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How much of the attribute is added. Higher shows more of it, and in the end breaks the "
                    "picture; the paper's range on Flux is 3 to 10. 0 leaves it out and costs less.",
                ),
                io.Float.Input(
                    "coarse",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the edit in the pooled text, which sets the look as a whole. Higher changes "
                    "style and build; 0 leaves it, and is what models without a pooled text need (Chroma, Qwen-Image).",
                ),
                io.Float.Input(
                    "tau",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Where to add it: higher keeps to the places that look at the words most. 0 is everywhere.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the edit that say where, commas between them; empty: all of them.",
                    advanced=True,
                ),
                inputs.layers("edit", "all that carry text and image apart: double"),
                *inputs.window(0.07, 1.0),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a guider, with your prompt.")],
        )

    @classmethod
    def execute(
        cls, model, clip, edit, fine, coarse, tau, words, layers, start_percent, end_percent
    ) -> io.NodeOutput:
        texts = fluxspace.texts(clip, edit, words)
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(fluxspace.apply(model, *texts, fine, coarse, tau, layers, schedule))


NODES = [FluxSpace]
