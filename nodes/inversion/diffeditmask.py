from comfy_api.latest import io

from ...patches.inversion import diffeditmask
from .. import inputs


class DiffEditMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerDiffEditMask",
            display_name="DiffEdit Mask",
            category="steer/inversion",
            description="Finds what has to change from one prompt to another: noises the picture a few times, asks the "
            "model what either prompt would make of it, and marks where the answers differ. Wire the mask to Keep "
            "Region, or to any inpainting.",
            search_aliases=[
                "DiffEdit", "automatic mask", "auto mask", "text to mask", "InstructEdit", "semantic mask", "segment",
                "mask from prompt",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any model of pictures or videos. Guidance on it is not asked."),
                io.Conditioning.Input("source", tooltip="A prompt that describes the picture as it is."),
                io.Conditioning.Input(
                    "target", tooltip="The same prompt with what shall change. The less else differs, the cleaner."
                ),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode. Each of a batch gets its own mask."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of the noises. Another seed moves the mask's edge a little.",
                ),
                io.Int.Input(
                    "maps",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="Noises to average over, two forwards each. Higher is less speckled and takes longer.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How far the picture is noised, as a share of the noise levels. Higher finds larger shapes "
                    "and forgets where exactly they were; lower keeps to what the picture shows.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How large a difference must be, as a share of the largest (outliers left out). Higher "
                    "makes the mask smaller.",
                ),
                io.Float.Input(
                    "blur",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Blur of the differences before the threshold, in cells of the latent (8 pixels or so). "
                    "Higher closes holes, drops specks and rounds the mask.",
                    advanced=True,
                ),
                inputs.grow(advanced=True),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="White where the prompts differ, in the picture's size."),
                io.Mask.Output(
                    display_name="map",
                    tooltip="The differences before the threshold, to choose it by. Lighter differs more.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, source, target, latent, seed, maps, strength, threshold, blur, grow
    ) -> io.NodeOutput:
        import latent_preview

        callback = latent_preview.prepare_callback(model, maps)
        found = diffeditmask.mask(
            model, source, target, latent["samples"], seed, maps, strength, threshold, blur, grow, callback
        )
        return io.NodeOutput(*found)


NODES = [DiffEditMask]
