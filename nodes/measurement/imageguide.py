from comfy_api.latest import io

from ...patches.measurement import imageguide
from ...patches.shared.energy import push
from ...patches.shared.vision import vision
from .. import energies, inputs


class ImageGuide(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerImageGuide",
            display_name="Image Guide",
            category="steer/measurement",
            description="Pulls every step's clean estimate towards a picture: its pixels, what another network sees in "
            "it, or only its colours. Any model, no inversion.",
            search_aliases=[
                "image guidance", "image guider", "latent guide", "perceptual loss", "palette", "color transfer",
                "colour match", "LDM guider", "reference",
            ],
            inputs=[
                energies.model(),
                energies.vae(),
                io.Image.Input("image", tooltip="The guide; one, or one for each of the batch."),
                io.Combo.Input(
                    "loss",
                    options=list(imageguide.LOSSES),
                    default="L2",
                    tooltip="L2: its pixels, where they are. perceptual: what another network sees in it, which needs "
                    "clip_vision or a scorer. palette: its colours alone, wherever they are.",
                ),
                energies.strength("towards the guide", 0.5),
                *energies.how(0.0, 0.9),
                *energies.more("the guide"),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="The network that looks, from Load CLIP Vision: CLIP, DINOv2."
                ),
                io.Custom("STEER_SCORER").Input(
                    "scorer",
                    optional=True,
                    tooltip="In its place a scorer that has features, such as Lab Scorer for the lab's portraits.",
                ),
            ],
            outputs=[energies.output()],
        )

    @classmethod
    def execute(
        cls, model, vae, image, loss, strength, gradient, norm, every, recurrence, start_percent, end_percent,
        mask=None, curve=None, clip_vision=None, scorer=None,
    ) -> io.NodeOutput:
        how = push(strength, gradient, norm, every, recurrence, mask)
        schedule = inputs.schedule(start_percent, end_percent, curve)
        eyes = scorer if clip_vision is None or loss != "perceptual" else vision(clip_vision)
        return io.NodeOutput(imageguide.apply(model, vae, image, loss, how, schedule, eyes))


NODES = [ImageGuide]
