from comfy_api.latest import io

from ...models.identity import evaclip
from ...patches.identity import pulid
from .. import adapters, inputs


class PuLID(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerPuLID",
            display_name="PuLID: Identity",
            category="steer/identity",
            description="Gives the picture a person's identity and leaves the rest to the text: who it is comes from a "
            "face recogniser, how the face looks from EVA-CLIP. For PuLID's files for SDXL (v1, v1.1) and Flux.",
            search_aliases=["PuLID", "PuLID Flux", "face", "identity", "same person", "ID customization"],
            inputs=[
                io.Model.Input("model", tooltip="The SDXL or Flux model that the adapter was made for."),
                io.Custom("STEER_ADAPTER").Input("adapter", tooltip="From SteerLoadAdapter: a file of PuLID."),
                io.Custom("STEER_FACE").Input(
                    "face", tooltip="From SteerFace with antelopev2, or its embedding as a tensor [faces, 512]."
                ),
                io.Custom("STEER_EVA_CLIP").Input(
                    "eva_clip", tooltip="From SteerLoadEVACLIP: it looks at the aligned face."
                ),
                io.Float.Input(
                    "strength", default=0.8, min=0.0, max=5.0, step=0.05,
                    tooltip="Higher is more like the person and less like the text. 0 is off.",
                ),
                io.Combo.Input(
                    "method", options=list(pulid.METHODS), default="fidelity",
                    tooltip="SDXL: fidelity keeps the face most, style leaves more to the picture's style, neutral "
                    "adds all that the identity says.",
                ),
                io.Int.Input(
                    "zeros", default=-1, min=-1, max=80,
                    tooltip="SDXL: tokens of nothing beside the person's; more leaves more to the text. -1 is what the "
                    "authors take for the method: for v1 8 in fidelity and 16 in style, for v1.1 20, in neutral none.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "combine", options=list(pulid.COMBINE), default="one person",
                    tooltip="Version 1 with several pictures: of one person, or of persons to be mixed.", advanced=True,
                ),
                io.Combo.Input(
                    "unconditional", options=["as trained", "none"], default="as trained",
                    tooltip="What the negative is shown: nobody, as the authors do, or nothing at all.", advanced=True,
                ),
                *inputs.window(),
                inputs.curve("the strength"),
                io.Mask.Input(
                    "face_mask",
                    optional=True,
                    tooltip="Where face and hair are in their own picture (or in crop), without ears, neck and "
                    "hat. The rest becomes white, as trained; without it all of the aligned square is shown.",
                ),
                io.Image.Input(
                    "crop", optional=True, tooltip="The aligned face, where the face comes without its picture."
                ),
                inputs.where("the person"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a guider.")],
        )

    @classmethod
    def execute(
        cls, model, adapter, face, eva_clip, strength, method, zeros, combine, unconditional, start_percent,
        end_percent, curve=None, face_mask=None, crop=None, mask=None,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(pulid.apply(
            model, adapter, face, eva_clip, strength, method, zeros, combine, unconditional, schedule, crop, face_mask,
            mask,
        ))


class LoadEVACLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLoadEVACLIP",
            display_name="Load EVA-CLIP",
            category="steer/identity",
            description="Loads the image encoder with which PuLID looks at a face: EVA02-CLIP-L-14-336, as published "
            "or in the layout of timm. The host's Load CLIP Vision does not know it.",
            search_aliases=["EVA CLIP", "EVA02-CLIP", "EVA02_CLIP_L_336_psz14_s6B", "PuLID loader", "Load Eva Clip"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=adapters.eva_clips(),
                    tooltip="EVA02_CLIP_L_336_psz14_s6B in models/clip_vision; files with eva in the name from "
                    "models/text_encoders, clip and eva_clip are listed too. vision.safetensors [lab] is the lab's "
                    "image encoder, for the lab's PuLID alone.",
                ),
            ],
            outputs=[io.Custom("STEER_EVA_CLIP").Output(display_name="eva_clip", tooltip="For SteerPuLID.")],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        if file is None or adapters.path_of(file, adapters.EVA_CLIP) is not None:
            return True
        return f"there is no file {file!r}; put EVA02_CLIP_L_336_psz14_s6B into models/clip_vision"

    @classmethod
    def fingerprint_inputs(cls, file=None):
        path = None if file is None else adapters.path_of(file, adapters.EVA_CLIP)
        return "" if path is None else f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        path = adapters.path_of(file, adapters.EVA_CLIP)
        if path is None:
            raise ValueError(f"SteerLoadEVACLIP: there is no file {file!r}; put it into models/clip_vision.")
        if file == adapters.LAB_EYES:
            from ...models.lab.pulid import Eyes

            return io.NodeOutput(Eyes())
        try:
            return io.NodeOutput(evaclip.load(str(path)))
        except ValueError as error:
            raise ValueError(f"SteerLoadEVACLIP: {error}") from error


NODES = [PuLID, LoadEVACLIP]
