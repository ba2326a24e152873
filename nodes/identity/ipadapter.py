from comfy_api.latest import io

from ...models.identity import adapter as files
from ...models.identity import siglip
from ...patches.identity import ipadapter
from .. import adapters, inputs


class IPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerIPAdapter",
            display_name="IP-Adapter: Image Prompt",
            category="steer/identity",
            description="Prompts with a picture beside the text: the picture becomes words of its own, which every "
            "cross-attention of a UNet asks too, or every block of Flux and SD3.5. What it carries (subject, face, "
            "style, layout) depends on the adapter. Several of these nodes add up, in any order.",
            search_aliases=[
                "image prompt", "IPAdapter", "IPAdapter Advanced", "IP adapter plus", "reference image",
                "style transfer", "composition transfer", "InstantStyle", "decoupled cross-attention", "Flux IPAdapter",
                "XLabs", "InstantX", "SD3 IPAdapter",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model (SD1.x, SD2.x, SDXL, Flux, SD3.5) that the adapter was made for."
                ),
                io.Custom("STEER_ADAPTER").Input("adapter", tooltip="From SteerLoadAdapter."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Higher follows the picture more and the text less; 0.5 to 0.8 leaves room for both. 0 is "
                    "off.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(ipadapter.WEIGHTS),
                    default=ipadapter.WEIGHTS[0],
                    tooltip="How the strength is shared out among the layers: alike (linear, as in the paper), rising "
                    "or falling with their depth, less in some, or only those that carry style or composition (SD1.x "
                    "and SDXL).",
                ),
                inputs.layers("act in", "all that attend to the text"),
                io.Combo.Input(
                    "combine",
                    options=list(ipadapter.COMBINE),
                    default="concat",
                    tooltip="What several pictures make: concat lets each be seen beside the others, average, add and "
                    "subtract (the first less the mean of the rest) make one of them, one each gives every item of "
                    "the batch its own.",
                ),
                io.Combo.Input(
                    "unconditional",
                    options=list(ipadapter.UNCONDITIONAL),
                    default="as trained",
                    tooltip="What the negative is shown: nothing as the adapter was trained with it, a black picture "
                    "as other packs do, or no picture at all.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "crop",
                    options=["center", "none"],
                    default="center",
                    tooltip="The encoder sees a square: its centre, or all of the picture, squeezed.",
                    advanced=True,
                ),
                *inputs.window(),
                inputs.curve("the strength"),
                io.Image.Input("image", optional=True, tooltip="The pictures to prompt with; needs clip_vision."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder that the adapter was trained with; SteerLoadAdapter says which.",
                ),
                io.ClipVisionOutput.Input(
                    "embeds", optional=True, tooltip="From CLIP Vision Encode, in place of the pictures."
                ),
                io.Image.Input(
                    "negative_image",
                    optional=True,
                    tooltip="Pictures for the negative, in place of what unconditional says: less of what they show.",
                ),
                inputs.where("the reference"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a guider.")],
        )

    @classmethod
    def execute(
        cls, model, adapter, strength, weight_type, layers, combine, unconditional, crop, start_percent, end_percent,
        curve=None, image=None, clip_vision=None, embeds=None, negative_image=None, mask=None,
    ) -> io.NodeOutput:
        schedule, head = inputs.schedule(start_percent, end_percent, curve), None
        if clip_vision is not None and getattr(adapter, "headed", False):
            head = siglip.head_of(clip_vision, adapters.encoders())
        return io.NodeOutput(ipadapter.apply(
            model, adapter, strength, weight_type, layers, combine, unconditional, schedule, image, clip_vision, embeds,
            negative_image, mask, crop == "center", head,
        ))


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        adapters.register()
        return io.Schema(
            node_id="SteerLoadAdapter",
            display_name="Load Adapter",
            category="steer/identity",
            description="Reads an adapter file of any of the public kinds, finds out from its contents what it is, and "
            "says which model and image encoder it needs.",
            search_aliases=["IPAdapter loader", "IPAdapter model loader", "load ip-adapter", "FaceID loader"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=adapters.found(),
                    tooltip="Files of models/ipadapter; those of other packs' folders, and the lab's, are marked so.",
                ),
                io.Combo.Input(
                    "variant",
                    options=["auto", *(variant for alike in files.ALIKE for variant in alike)],
                    default="auto",
                    tooltip="What the file's contents cannot tell: auto goes by its name (plusv2, plus-face, "
                    "composition). Choose where the file was renamed.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Custom("STEER_ADAPTER").Output(display_name="adapter", tooltip="For SteerIPAdapter and its kin."),
                io.String.Output(display_name="found", tooltip="What the file is and which encoder it needs."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        if file is None or adapters.path_of(file) is not None:
            return True
        return f"there is no adapter {file!r}; put it into models/ipadapter"

    @classmethod
    def fingerprint_inputs(cls, file=None, variant=None):
        path = None if file is None else adapters.path_of(file)
        return "" if path is None else f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, file, variant) -> io.NodeOutput:
        path = adapters.path_of(file)
        if path is None:
            raise ValueError(f"SteerLoadAdapter: there is no adapter {file!r}; put it into models/ipadapter.")
        try:
            adapter = files.load(str(path), variant)
        except ValueError as error:
            raise ValueError(f"SteerLoadAdapter: {error}") from error
        return io.NodeOutput(adapter, str(adapter), ui={"text": [str(adapter)]})


NODES = [IPAdapter, LoadAdapter]
