from comfy_api.latest import io

from ...patches.tokens import regions
from .. import inputs


def region(n, default="", optional=True):
    """The inputs of region number n."""
    return [
        io.String.Input(
            f"words_{n}",
            default=default,
            multiline=True,
            tooltip="What the prompt says of this region, as it stands there, commas and all; several phrases on lines "
            'of their own. A phrase stands for every place where the prompt has it; "#3" is the third word alone.',
        ),
        io.Mask.Input(
            f"mask_{n}",
            optional=optional,
            tooltip="Where these words count: white all, black not at all, grey in between. Of any size with the "
            "picture's aspect; one for the whole batch, or one for each picture. Masks may overlap.",
        ),
    ]


class Regions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        pairs = [region(1, optional=False), *(region(n) for n in (2, 3, 4))]
        return io.Schema(
            node_id="SteerRegions",
            display_name="Regions: Words in Their Place",
            category="steer/tokens",
            description="Gives words of one prompt a part of the picture each, so that two subjects do not mix: only "
            "where the mask is white are its words seen. All other words count everywhere. Wire its positive to the "
            "sampler.",
            search_aliases=[
                "regional prompt", "regional prompting", "attention couple", "attribute leakage", "concept bleeding",
                "attribute binding", "two persons", "multi subject", "latent couple", "mask prompt", "layout",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A UNet or a DiT."),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same checkpoint loader."),
                io.String.Input("prompt", multiline=True, tooltip="The whole picture in one prompt, all regions."),
                *pairs[0],
                *pairs[1],
                *pairs[2],
                *pairs[3],
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the attention that words get outside of their region is taken away. Higher "
                    "keeps subjects further apart; 0 is off.",
                ),
                io.Combo.Input(
                    "isolate",
                    options=list(regions.ISOLATE),
                    tooltip="on: regions do not look at each other's picture either, only at what is in no region. "
                    "Less is carried over, and the parts fit together less well. auto: on for DiTs, off for UNets.",
                ),
                inputs.layers("act in", "all"),
                *inputs.window(),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The same prompt as another node has made it since (FastComposer, ControlNet); without it, "
                    "the prompt is encoded here.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, steered. Wire it to a sampler."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt. Wire it to the same sampler."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, prompt, words_1, mask_1, words_2, words_3, words_4, strength, isolate, layers, start_percent,
        end_percent, mask_2=None, mask_3=None, mask_4=None, positive=None,
    ) -> io.NodeOutput:
        given = [(words_1, mask_1), (words_2, mask_2), (words_3, mask_3), (words_4, mask_4)]
        schedule = inputs.schedule(start_percent, end_percent)
        return io.NodeOutput(*regions.apply(model, clip, prompt, given, strength, isolate, layers, schedule, positive))


NODES = [Regions]
