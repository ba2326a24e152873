from comfy_api.latest import io

from ...patches.inversion import negativepromptinversion


class NegativePromptInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerNegativePromptInversion",
            display_name="Negative-prompt Inversion",
            category="steer/inversion",
            description="Makes the negative with which an inverted picture keeps its path at any cfg: the prompt of "
            "the picture. An edit then moves from it to what is new in the prompt, and nothing else. Costs "
            "nothing.",
            search_aliases=["NPI", "negative prompt inversion", "fast null-text inversion", "proximal guidance"],
            inputs=[
                io.Conditioning.Input(
                    "source", tooltip="The prompt of the picture, with which it was inverted."
                ),
                io.Float.Input(
                    "interpolation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far from the source's prompt towards the negative. Higher edits more strongly and "
                    "keeps less of the picture; 0 is the method, 1 the negative itself.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The usual negative, for an interpolation above 0."
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="negative", tooltip="For the negative of KSampler or CFGGuider."
                )
            ],
        )

    @classmethod
    def execute(cls, source, interpolation, negative=None) -> io.NodeOutput:
        return io.NodeOutput(negativepromptinversion.apply(source, negative, interpolation))


NODES = [NegativePromptInversion]
