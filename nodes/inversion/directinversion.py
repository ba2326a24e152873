from comfy_api.latest import io

from ...patches.inversion import directinversion
from .. import inputs


class DirectInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerDirectInversion",
            display_name="Direct Inversion",
            category="steer/inversion",
            description="Keeps the edit of an inverted picture near the picture: what the sampler loses of the source "
            "in each step, at its cfg, is given to the edit. At offset 1, with the prompt of the source, the picture "
            "itself returns, at any cfg.",
            search_aliases=["PnP inversion", "pinned inversion", "exact inversion", "real image editing"],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the picture was inverted."),
                inputs.trajectory(),
                io.Float.Input(
                    "offset",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the source's loss the edit is given. Higher keeps what the edit leaves alone "
                    "closer to the picture, and at a high cfg brings back traces of what it replaces. 1 returns the "
                    "source under its own prompt. 0 is off.",
                ),
                *inputs.window(),
                inputs.source(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, steered. Sample it with euler, from the noise and sigmas of SteerInvert."
                )
            ],
        )

    @classmethod
    def execute(cls, model, trajectory, offset, start_percent, end_percent, source=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(directinversion.apply(model, trajectory, offset, schedule, source))


NODES = [DirectInversion]
