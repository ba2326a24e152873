from comfy_api.latest import io

from ...patches.attention import wordmask
from .. import inputs


class WordMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerWordMask",
            display_name="Word Mask",
            category="steer/attention",
            description="Finds where words of a prompt are in a picture: the attention that the model itself pays "
            "them. Gives a MASK, for Keep Region, MasaCtrl or any inpainting, without a segmentation model.",
            search_aliases=[
                "attention map", "cross-attention map", "DAAM", "local blend", "segment", "text to mask",
                "mask from prompt", "where is the word",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that reads prompt and picture: a UNet or a DiT."),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same checkpoint loader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="A prompt that describes the picture, with the words in it.",
                ),
                io.String.Input(
                    "words",
                    tooltip='Words of the prompt to look for, with commas: "hair, top hat". Each stands for every '
                    'place where the prompt has it; "#3" is the third word alone.',
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much attention makes it into the mask, from the least of the picture (0) to the most "
                    "(1). Higher makes the mask smaller.",
                ),
                io.Float.Input(
                    "soft",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Width of a ramp around the threshold. 0 cuts hard; higher blends.",
                ),
                *inputs.window(0.2, 0.8),
                io.Int.Input(
                    "levels",
                    default=5,
                    min=1,
                    max=1000,
                    tooltip="With latent: at how many noise levels in the window to look, one forward each. Higher is "
                    "smoother and takes longer.",
                    advanced=True,
                ),
                inputs.layers("read", "on UNets those at a quarter of the latent's side, as in the paper; all on DiTs"),
                inputs.grow(advanced=True),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="With latent: of the noise. Another seed moves the mask's edge a little.",
                    advanced=True,
                ),
                io.Custom("STEER_TRAJECTORY").Input(
                    "trajectory",
                    optional=True,
                    tooltip="From SteerInvert: the picture, at each of its noise levels in the window. Or wire latent.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The picture from VAE Encode, to be noised. Or wire trajectory."
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="White where the words are, in the picture's size."),
                io.Mask.Output(
                    display_name="map",
                    tooltip="The attention before the threshold, to choose it by. Lighter is more.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, prompt, words, threshold, soft, start_percent, end_percent, levels, layers, grow, seed,
        trajectory=None, latent=None,
    ) -> io.NodeOutput:
        import latent_preview

        samples = None if latent is None else latent["samples"]
        callback = latent_preview.prepare_callback(model, levels if trajectory is None else len(trajectory.sigmas))
        found = wordmask.mask(
            model, clip, prompt, words, samples, trajectory, start_percent, end_percent, levels, layers, threshold,
            soft, grow, seed, callback,
        )
        return io.NodeOutput(*found)


NODES = [WordMask]
