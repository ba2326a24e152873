from comfy_api.latest import io

from ...patches.measurement import clipguidance
from ...patches.shared.energy import push
from .. import energies, inputs


class CLIPGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerCLIPGuidance",
            display_name="CLIP Guidance",
            category="steer/measurement",
            description="Pulls every step's clean estimate to where CLIP's image encoder sees what its text encoder "
            "reads, whatever the model itself was trained on. Needs both encoders of one CLIP.",
            search_aliases=["CLIP guidance", "clip guided diffusion", "cutouts", "spherical distance"],
            inputs=[
                energies.model(),
                energies.vae(),
                io.Clip.Input("clip", tooltip="The text encoder of the CLIP, with its projection."),
                io.ClipVision.Input("clip_vision", tooltip="Its image encoder, from Load CLIP Vision."),
                io.String.Input("text", multiline=True, tooltip="What CLIP shall see in the picture."),
                energies.strength("towards the text"),
                io.Int.Input(
                    "cutouts",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Looks at so many parts of the picture in place of all. Higher is steadier, and costs a "
                    "look each.",
                    advanced=True,
                ),
                io.Int.Input("seed", default=0, min=0, max=2**32, tooltip="Of the cutouts' places.", advanced=True),
                *energies.how(),
                *energies.more("the text"),
            ],
            outputs=[energies.output()],
        )

    @classmethod
    def execute(
        cls, model, vae, clip, clip_vision, text, strength, cutouts, seed, gradient, norm, every, recurrence,
        start_percent, end_percent, mask=None, curve=None,
    ) -> io.NodeOutput:
        how = push(strength, gradient, norm, every, recurrence, mask)
        schedule = inputs.schedule(start_percent, end_percent, curve)
        steered = clipguidance.apply(model, vae, clip, clip_vision, text, how, schedule, cutouts, seed)
        return io.NodeOutput(steered)


NODES = [CLIPGuidance]
