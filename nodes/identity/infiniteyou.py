from comfy_api.latest import io

from ...patches.identity import infiniteyou
from .. import inputs


class InfiniteYou(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerInfiniteYou",
            display_name="InfiniteYou: InfuseNet",
            category="steer/identity",
            description="Draws a face again with Flux: InfuseNet, a ControlNet that sees the face in place of the "
            "text, adds to what the blocks pass on. Other ControlNets keep the text.",
            search_aliases=[
                "InfiniteYou", "InfuseNet", "InfU", "Flux face", "Flux identity", "same face", "same person",
                "identity",
            ],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt, for a model of Flux."),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt; it is shown no face. At cfg 1 it is unused."
                ),
                io.Custom("STEER_ADAPTER").Input(
                    "adapter", tooltip="From SteerLoadAdapter: InfiniteYou's image_proj_model.bin."
                ),
                io.ControlNet.Input(
                    "control_net", tooltip="InfuseNet, from the host's ControlNet loader; it stays as it is for others."
                ),
                io.Custom("STEER_FACE").Input(
                    "face", tooltip="An embedding of the recogniser it was trained with (facexlib's ArcFace), as a "
                    "tensor [faces, 512] or from SteerFace. Several are one person, and their mean counts."
                ),
                io.Vae.Input("vae", tooltip="Flux's VAE, which encodes the keypoints for InfuseNet."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Higher is more like the face and less like the text. 0 is off.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Distilled guidance that InfuseNet is told, 1 as in the official code. The model keeps "
                    "its own.",
                    advanced=True,
                ),
                *inputs.window(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The face's keypoints, drawn by SteerFaceKeypoints; without it the face may be anywhere.",
                ),
                inputs.where("the face", " One node with a mask for each of several persons."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="With InfuseNet and the face's tokens."),
                io.Conditioning.Output(display_name="negative", tooltip="With InfuseNet and the tokens of no face."),
            ],
        )

    @classmethod
    def execute(
        cls, positive, negative, adapter, control_net, face, vae, strength, guidance, start_percent, end_percent,
        image=None, mask=None,
    ) -> io.NodeOutput:
        return io.NodeOutput(*infiniteyou.apply(
            positive, negative, adapter, control_net, face, vae, strength, guidance, start_percent, end_percent, image,
            mask,
        ))


NODES = [InfiniteYou]
