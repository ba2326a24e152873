from comfy_api.latest import io

from ...patches.identity import fastcomposer


class FastComposer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerFastComposer",
            display_name="FastComposer: Multi-Subject Personalization",
            category="steer/identity",
            description="Gives each of several subjects of a prompt a picture of its own: the word of a subject is "
            "fused with what an image encoder saw, after the text encoder. The early steps see the prompt alone "
            "(delayed subject conditioning).",
            search_aliases=[
                "FastComposer", "multi subject", "two persons", "several people", "subject driven",
                "delayed subject conditioning", "identity blending",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model of SD1.5; the file's own UNet takes its place."),
                io.Clip.Input("clip", tooltip="Its text encoder; the file's own takes its place."),
                io.Custom("STEER_ADAPTER").Input("adapter", tooltip="From SteerLoadAdapter: FastComposer's file."),
                io.Image.Input(
                    "image", tooltip="One picture for each subject, in their order: a batch, as of Batch Images."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a man and a woman reading a book together",
                    tooltip="The prompt, with a word for each subject.",
                ),
                io.String.Input(
                    "subjects",
                    default="man, woman",
                    tooltip='The words of the subjects, with commas between them, in the order of the pictures. '
                    '"man, man" are the first and the second man, "#3" is the third word.',
                ),
                io.Float.Input(
                    "merge",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the sampling range that sees the prompt alone, before the pictures join in. "
                    "Higher obeys the prompt more, and is less like the subjects.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the file's UNet, where the file has one."),
                io.Clip.Output(tooltip="The file's text encoder, where it has one; encode the negative with it."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the subjects in it."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, adapter, image, text, subjects, merge) -> io.NodeOutput:
        return io.NodeOutput(*fastcomposer.apply(model, clip, adapter, image, text, subjects, merge))


NODES = [FastComposer]
