from comfy_api.latest import io

from ...patches.attention import prompttoprompt
from ...patches.shared.alignment import OPERATIONS
from .. import inputs


class PromptToPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerPromptToPrompt",
            display_name="Prompt-to-Prompt",
            category="steer/attention",
            description="Edits a picture by editing its prompt: words replaced, put in, left out, made stronger or "
            "weaker. Layout and shapes stay, since attention to the words that both prompts have is the source's. Wire "
            "its positive to the guider, and sample from the noise and sigmas of SteerInvert.",
            search_aliases=[
                "P2P", "cross-attention control", "attention reweighting", "word swap", "prompt refinement",
                "local blend", "prompt editing",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the picture was inverted: a UNet or a DiT."),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same checkpoint loader."),
                inputs.trajectory(),
                io.String.Input(
                    "source_prompt", multiline=True, tooltip="The prompt that the picture was inverted with."
                ),
                io.String.Input(
                    "prompt", multiline=True, tooltip="The same, edited. The less differs, the more of it stays."
                ),
                io.Combo.Input(
                    "operation",
                    options=list(OPERATIONS),
                    tooltip="refine: words put in or left out; what both have is matched in order. replace: word for "
                    "word, as many in both; the new word goes where the old one was. reorder: equal words wherever "
                    "they stand, and those in word_map.",
                ),
                inputs.weights(),
                io.Float.Input(
                    "cross_replace",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps in which attention to words is the source's. Higher keeps more of the "
                    "layout; lower gives the new words more room. 0 is off.",
                ),
                io.Float.Input(
                    "self_replace",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps in which attention within the picture is the source's. Higher keeps "
                    "more of the shapes; lower lets new things take other ones. 0 is off.",
                ),
                *inputs.blend(0.3),
                io.String.Input(
                    "word_map",
                    tooltip='For reorder: "source word: new word, ..." whose attention goes where; "#3: #5" by number. '
                    "Words that it does not name go to their equals.",
                    advanced=True,
                ),
                inputs.source_weights(),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the new picture's own attention to words while cross_replace lasts. Higher lets "
                    'a style that was put in ("in watercolor") reshape more; 0 is the source\'s alone, 1 is '
                    "cross_replace 0.",
                    advanced=True,
                ),
                inputs.layers("edit", "all for words; within the picture those with at most a quarter of the latent's "
                              "places, as in the paper"),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Wire it to a guider."),
                io.Conditioning.Output(display_name="positive", tooltip="The new prompt. Wire it to the same guider."),
                io.String.Output(
                    display_name="alignment", tooltip="Which word gets its attention from which, for Preview as Text."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, prompt, operation, weights, cross_replace, self_replace,
        blend_words, blend_threshold, word_map, source_weights, alpha, layers,
    ) -> io.NodeOutput:
        return io.NodeOutput(*prompttoprompt.apply(
            model, clip, trajectory, source_prompt, prompt, operation, word_map, weights=weights,
            source_weights=source_weights, cross_replace=cross_replace, self_replace=self_replace,
            blend_words=blend_words, blend_threshold=blend_threshold, layers=layers, alpha=alpha,
        ))


NODES = [PromptToPrompt]
