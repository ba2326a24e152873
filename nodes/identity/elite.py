from comfy_api.latest import io

from ...patches.identity import elite
from .. import inputs


class ELITE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerELITE",
            display_name="ELITE: Object as a Word",
            category="steer/identity",
            description="Draws an object of a picture again: a mapper makes a word of the picture that stands in the "
            "prompt, another adds the object's details where the new picture looks at this word.",
            search_aliases=[
                "ELITE", "subject driven", "customization", "concept to word", "textual embedding of a picture",
                "same object",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model of SD1.4 or SD1.5; its keys and values become the mapper's."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Custom("STEER_ADAPTER").Input("adapter", tooltip="From SteerLoadAdapter: ELITE's global_mapper.pt."),
                io.ClipVision.Input("clip_vision", tooltip="CLIP ViT-L/14 (OpenAI), of pictures of 224 pixels."),
                io.Image.Input("image", tooltip="A picture with the object in its middle."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a photo of a S on the beach",
                    tooltip="The prompt, with a word for the object.",
                ),
                io.String.Input(
                    "word",
                    default="S",
                    tooltip="The word whose place the picture takes: there once, and short. #5 is the fifth word.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Of the details. Higher is more like the object and less like the text; 0 leaves the word "
                    "alone. Without local there are none.",
                ),
                *inputs.window(),
                inputs.curve("the strength"),
                io.Custom("STEER_ADAPTER").Input(
                    "local", optional=True, tooltip="From SteerLoadAdapter: ELITE's local_mapper.pt, for details."
                ),
                io.Mask.Input(
                    "object_mask",
                    optional=True,
                    tooltip="Where the object is in its own picture; what is around it gives no details.",
                ),
                inputs.where("the object's details"),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered, with the mapper's keys and values."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the object in it."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, adapter, clip_vision, image, text, word, strength, start_percent, end_percent, curve=None,
        local=None, object_mask=None, mask=None,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(*elite.apply(
            model, clip, adapter, clip_vision, image, text, word, strength, schedule, local, object_mask, mask
        ))


NODES = [ELITE]
