from comfy_api.latest import io

from ...patches.attention import kvreuse
from .. import inputs


class KVReuse(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerKVReuse",
            display_name="KV Reuse (KV-Edit)",
            category="steer/attention",
            description="Edits the masked part of a picture and keeps the rest bit for bit. What is drawn into the "
            "mask attends to the keys and values that the rest has in the source, so that it fits in. Nothing is kept "
            "over time: memory does not grow with the steps.",
            search_aliases=[
                "KV-Edit", "background preservation", "inpaint", "masked edit", "kv cache", "object removal", "mask",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the picture was inverted: a UNet or a DiT."),
                inputs.trajectory(),
                io.Mask.Input(
                    "mask",
                    tooltip="White may change, black is kept. One for the whole batch, or one for each picture; of any "
                    "size with the picture's aspect.",
                ),
                io.Boolean.Input(
                    "re_init",
                    default=False,
                    tooltip="Starts the masked part from fresh noise instead of the source's. Turn it on to remove "
                    "something or to paint something else; off, the new follows the shape of the old.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the fresh noise with re_init; without it, it does nothing.",
                ),
                io.Float.Input(
                    "attention_scale",
                    default=0.0,
                    min=-50.0,
                    max=50.0,
                    step=0.1,
                    tooltip="Added to the attention scores of what is kept. Higher fits the edit more to its "
                    "surroundings, lower (below 0) lets it go its own way. 0 changes nothing.",
                    advanced=True,
                ),
                inputs.grow(),
                inputs.feather(),
                inputs.layers("take the source's keys and values in", "all"),
                *inputs.window(),
                inputs.source(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, steered. Sample it from the noise and sigmas of SteerInvert, with the "
                    "picture's latent."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, mask, re_init, seed, attention_scale, grow, feather, layers, start_percent, end_percent,
        source=None,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(
            kvreuse.apply(
                model, trajectory, mask, attention_scale, layers, schedule, grow, feather, re_init, seed, source
            )
        )


NODES = [KVReuse]
