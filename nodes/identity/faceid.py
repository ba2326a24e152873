from comfy_api.latest import io

from ...patches.identity import faceid
from ...patches.identity.ipadapter import COMBINE, WEIGHTS
from .. import inputs


class FaceID(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerFaceID",
            display_name="IP-Adapter FaceID: Face Prompt",
            category="steer/identity",
            description="Prompts with a face beside the text: who it is comes from a face recogniser, and with the "
            "plus adapters its looks from the picture too. The LoRA in the file is applied here. For FaceID, "
            "FaceID-plus, portrait and portrait unnorm.",
            search_aliases=[
                "FaceID", "IPAdapter FaceID", "face id plus", "portrait", "same face", "same person", "identity",
                "face swap", "character consistency",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The UNet (SD1.x, SDXL) that the adapter was made for, without the adapter's LoRA."
                ),
                io.Custom("STEER_ADAPTER").Input(
                    "adapter", tooltip="From SteerLoadAdapter: a FaceID or portrait file."
                ),
                io.Custom("STEER_FACE").Input(
                    "face", tooltip="From SteerFace, or an embedding of another pack as a tensor [faces, 512]."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Higher is more like the face and less like the text. 0 is off, the LoRA too.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHTS),
                    default=WEIGHTS[0],
                    tooltip="How the strength is shared out among the layers; see IP-Adapter.",
                    advanced=True,
                ),
                inputs.layers("act in", "all that attend to the text"),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINE),
                    default="concat",
                    tooltip="What several pictures of a face make: concat shows all side by side, as the official code "
                    "does, average makes one of them, one each gives every item of the batch its own.",
                ),
                io.Combo.Input(
                    "unconditional",
                    options=["as trained", "none"],
                    default="as trained",
                    tooltip="What the negative is shown: no face, as the adapter was trained, or nothing at all.",
                    advanced=True,
                ),
                io.Float.Input(
                    "structure",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="FaceID-plus v2 alone: how much the crop adds to who it is. Higher keeps the face's shape "
                    "and expression more, lower leaves the text more freedom.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Of the LoRA in the file, as trained at 1. Higher is more like the face, 0 leaves it out.",
                ),
                *inputs.window(),
                inputs.curve("the strength"),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For the plus adapters: the image encoder that looks at the aligned face.",
                ),
                io.Image.Input(
                    "crop",
                    optional=True,
                    tooltip="For the plus adapters: the aligned face, where the face comes without its picture.",
                ),
                inputs.where("the face"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a guider.")],
        )

    @classmethod
    def execute(
        cls, model, adapter, face, strength, weight_type, layers, combine, unconditional, structure, lora_strength,
        start_percent, end_percent, curve=None, clip_vision=None, crop=None, mask=None,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(faceid.apply(
            model, adapter, face, strength, weight_type, layers, combine, unconditional, structure, lora_strength,
            schedule, clip_vision, crop, mask,
        ))


NODES = [FaceID]
