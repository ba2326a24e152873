from comfy_api.latest import io

from ...patches.identity import photomaker


class PhotoMaker(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerPhotoMaker",
            display_name="PhotoMaker: Stacked Identity Embedding",
            category="steer/identity",
            description="Puts pictures of a person in place of a word of the prompt: the word before the trigger "
            "becomes one word for each picture, fused with what an image encoder saw in it. For version 1 and 2; the "
            "LoRA in the file is applied here.",
            search_aliases=[
                "PhotoMaker", "PhotoMaker v2", "PhotoMaker Encode", "ID embedding", "same person", "identity",
                "character consistency", "img trigger", "delayed merge", "start merge step",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model of SDXL, without PhotoMaker's LoRA."),
                io.Clip.Input("clip", tooltip="The text encoders of the same model."),
                io.Custom("STEER_ADAPTER").Input("adapter", tooltip="From SteerLoadAdapter: PhotoMaker v1 or v2."),
                io.Image.Input(
                    "image",
                    tooltip="Pictures of the person, one or several, with the face large. More of them tell more of "
                    "who it is and less of one picture.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="portrait photo of a woman img, natural light",
                    tooltip="The prompt, with the trigger right after the word for the person (man, woman, girl).",
                ),
                io.String.Input(
                    "trigger",
                    default="img",
                    tooltip="The word that marks the place; it is taken out of the prompt. It is found by its "
                    "tokens, so weights such as (woman img:1.2), commas and line breaks do no harm.",
                    advanced=True,
                ),
                io.Float.Input(
                    "merge",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the sampling range that sees the prompt alone, before the pictures join in. "
                    "Higher obeys the prompt's style and layout more, and is less like the person.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Of the LoRA in the file, as trained at 1. 0 leaves it out, for a model that carries it "
                    "already.",
                ),
                io.Custom("STEER_FACE").Input(
                    "face",
                    optional=True,
                    tooltip="For version 2: from SteerFace, one face for each picture, in the same order.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the file's LoRA."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the person in it."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, adapter, image, text, trigger, merge, lora_strength, face=None
    ) -> io.NodeOutput:
        return io.NodeOutput(*photomaker.apply(
            model, clip, adapter, image, text, trigger, merge, lora_strength, face
        ))


NODES = [PhotoMaker]
