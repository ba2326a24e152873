from comfy_api.latest import io

from ...patches.inversion import keepregion
from .. import inputs


class KeepRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerKeepRegion",
            display_name="Keep Region (Blended Latent Diffusion)",
            category="steer/inversion",
            description="Only the masked part of the picture may change. Outside the mask the latent is put back on "
            "the source's path at every step and comes out bit for bit as it went in, with any sampler. Goes with any "
            "editing node, or with a prompt alone.",
            search_aliases=[
                "Blended Latent Diffusion", "BLD", "keep region", "inpaint", "masked edit", "preserve background",
                "latent blend", "mask", "background",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any model of pictures or videos, with its editing nodes or without."),
                io.Mask.Input(
                    "mask",
                    tooltip="White may change, black is kept. One for the whole batch, or one for each picture; of any "
                    "size with the picture's aspect. A cell of the latent (8 pixels or so) may change where any of "
                    "its pixels is white.",
                ),
                io.Custom("STEER_TRAJECTORY").Input(
                    "trajectory",
                    optional=True,
                    tooltip="The picture's, from Invert: what is kept is then on the very path that leads to it, and "
                    "edits join it best. Without one, the sampler's latent under the sampler's noise is kept.",
                ),
                inputs.grow(),
                inputs.feather(),
                *inputs.window(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Wire it to any sampler or guider, with the picture's "
                "latent."),
            ],
        )

    @classmethod
    def execute(cls, model, mask, grow, feather, start_percent, end_percent, trajectory=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(keepregion.apply(model, mask, trajectory, grow, feather, schedule))


NODES = [KeepRegion]
