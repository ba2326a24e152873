from comfy_api.latest import io

from ...patches.identity import instantid
from ...patches.identity.ipadapter import WEIGHTS
from .. import inputs


class InstantID(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerInstantID",
            display_name="InstantID: Identity and Keypoints",
            category="steer/identity",
            description="Draws a face again from one picture: who it is comes as words beside the text, where it is "
            "from a ControlNet that sees the face's keypoints and, in place of the text, the face. Other ControlNets "
            "keep the text.",
            search_aliases=[
                "InstantID", "Apply InstantID", "face id", "same face", "same person", "identity", "face keypoints",
                "IdentityNet", "face ControlNet",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model of SDXL, or the lab's UNet with the lab's adapter."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; it is shown no face."),
                io.Custom("STEER_ADAPTER").Input(
                    "adapter", tooltip="From SteerLoadAdapter: InstantID's ip-adapter.bin."
                ),
                io.ControlNet.Input(
                    "control_net",
                    tooltip="InstantID's ControlNet, from the host's loader; it stays as it is for others.",
                ),
                io.Custom("STEER_FACE").Input(
                    "face", tooltip="From SteerFace, or an embedding of another pack as a tensor [faces, 512]. Several "
                    "are one person, and their mean counts."
                ),
                io.Image.Input(
                    "image", tooltip="The face's keypoints, drawn by SteerFaceKeypoints: where the face is."
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Of the words in the UNet. Higher is more like the face and less like the text. 0 is off.",
                ),
                io.Float.Input(
                    "control_strength",
                    default=0.8,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Of the ControlNet. Higher holds the face to its place and looks more, and leaves the text "
                    "less. 0 is off.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHTS),
                    default=WEIGHTS[0],
                    tooltip="How the strength is shared out among the layers; see IP-Adapter.",
                    advanced=True,
                ),
                inputs.layers("act in", "all that attend to the text"),
                *inputs.window(),
                inputs.curve("the strength"),
                inputs.where(
                    "the face, for words and ControlNet,", " One node with a mask for each of several persons."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a guider."),
                io.Conditioning.Output(display_name="positive", tooltip="With the ControlNet and the face's tokens."),
                io.Conditioning.Output(display_name="negative", tooltip="With the ControlNet; it sees no face."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, adapter, control_net, face, image, strength, control_strength, weight_type,
        layers, start_percent, end_percent, curve=None, mask=None,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(*instantid.apply(
            model, positive, negative, adapter, control_net, face, image, strength, control_strength, weight_type,
            layers, schedule, mask,
        ))


NODES = [InstantID]
