from comfy_api.latest import io

from ...patches.attention import unifiedattention
from ...patches.shared.alignment import OPERATIONS
from .. import inputs


class UnifiedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerUnifiedAttention",
            display_name="Unified Attention Control (InfEdit)",
            category="steer/attention",
            description="Edits without inversion that keep the layout: while FlowEdit (or DDCM) edits, attention to "
            "words that both prompts have is the source picture's, and self-attention first takes its layout, then its "
            "textures. Words can be weighed, and the edit held to where they are. Wire the model and both prompts that "
            "come out to SteerFlowEdit, whose noise it uses.",
            search_aliases=[
                "InfEdit", "UAC", "attention modulation", "attention merging", "cross-attention control",
                "inversion-free editing", "attention reweighting", "local blend",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that edits: a UNet or a DiT."),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same checkpoint loader."),
                io.String.Input(
                    "source_prompt", multiline=True, tooltip="A prompt that describes the picture as it is."
                ),
                io.String.Input(
                    "prompt", multiline=True, tooltip="The same, edited. The less differs, the more of it stays."
                ),
                io.Combo.Input(
                    "operation",
                    options=list(OPERATIONS),
                    tooltip="refine: words put in or left out; what both have is matched in order. replace: word for "
                    "word, as many in both; the new word goes where the old one was. reorder: equal words wherever "
                    "they stand.",
                ),
                inputs.weights(),
                io.Float.Input(
                    "cross_replace",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the window in which attention to words is the source's. Higher keeps more of the "
                    "layout; lower gives the new words more room. 0 is off, and leaves self-attention alone.",
                ),
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
                *inputs.blend(0.6),
                inputs.source_weights(),
                inputs.layers("act in", "all"),
                *inputs.window(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Wire it to SteerFlowEdit."),
                io.Conditioning.Output(display_name="source", tooltip="The source prompt, for SteerFlowEdit."),
                io.Conditioning.Output(display_name="positive", tooltip="The new prompt, for SteerFlowEdit."),
                io.String.Output(
                    display_name="alignment", tooltip="Which word gets its attention from which, for Preview as Text."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, source_prompt, prompt, operation, weights, cross_replace, self_replace, eta, gamma,
        blend_words, blend_threshold, source_weights, layers, start_percent, end_percent,
    ) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent)
        source, positive, alignment = texts = unifiedattention.prompts(clip, source_prompt, prompt, operation)
        made = unifiedattention.apply(
            model, self_replace, eta, gamma, layers, schedule, cross_replace, texts, weights, source_weights,
            blend_words, blend_threshold,
        )
        return io.NodeOutput(made, source, positive, str(alignment))


NODES = [UnifiedAttention]
