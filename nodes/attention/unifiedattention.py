from comfy_api.latest import io

from ...patches.attention import unifiedattention
from .. import inputs


class UnifiedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerUnifiedAttention",
            display_name="Unified Attention Control (InfEdit)",
            category="steer/attention",
            description="Edits without inversion that keep the layout: while FlowEdit (or DDCM) edits, self-attention "
            "first takes the layout of the source picture, then its textures. Wire the model that comes out to "
            "SteerFlowEdit, whose source prompt and noise it uses.",
            search_aliases=["InfEdit", "UAC", "attention modulation", "attention merging", "inversion-free editing"],
            inputs=[
                io.Model.Input("model", tooltip="The model that edits: a UNet or a DiT."),
                io.Float.Input(
                    "self_replace",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the window in which places attend to each other as in the source. Higher keeps "
                    "more of its layout; after it, keys and values are the source's. 0 is textures alone, 1 layout "
                    "alone.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the edit's own attention in the first part. Higher keeps less of the source's "
                    "layout; 1 leaves that part out.",
                ),
                io.Float.Input(
                    "gamma",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the edit's own attention in the second part. Higher keeps less of the source's "
                    "textures; 1 leaves that part out.",
                ),
                inputs.layers("act in", "all"),
                *inputs.window(),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to SteerFlowEdit.")],
        )

    @classmethod
    def execute(cls, model, self_replace, eta, gamma, layers, start_percent, end_percent) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(unifiedattention.apply(model, self_replace, eta, gamma, layers, schedule))


NODES = [UnifiedAttention]
