from comfy_api.latest import io

from ...patches.hspace import direction
from .. import inputs

OUTPUT = io.Custom("STEER_DIRECTION")


def found():
    return OUTPUT.Output(display_name="direction", tooltip="For SteerAsyrp, on this model and at this size.")


def layer():
    return io.String.Input(
        "layer",
        default="middle",
        tooltip='The block whose features are compared: "middle" is the h-space. "output.0" and later ones hold more '
        "of colours and detail.",
        advanced=True,
    )


STEPS = "Noise levels at which features are compared. More fit the sampler's own steps better and take longer."


class HSpaceDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerHSpaceDirection",
            display_name="h-space Direction of Prompts",
            category="steer/hspace",
            description="Draws pictures with two prompts from the same noise, and keeps what the features at the "
            "bottom of the UNet differ in. SteerAsyrp adds it to any other picture, whatever its prompt.",
            search_aliases=["h-space", "Asyrp", "semantic direction", "delta h", "attribute direction", "slider"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet (SD1.x, SD2.x, SDXL)."),
                io.Conditioning.Input("positive", tooltip='What the direction leads to, such as "glasses".'),
                io.Conditioning.Input("negative", tooltip='What it leads away from, such as "no glasses".'),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size that will be edited. Its batch is the number of pictures "
                    "drawn with each prompt; more give a cleaner direction.",
                ),
                io.Noise.Input("noise", tooltip="Where the pictures start, the same for both prompts."),
                inputs.steps(STEPS, 20),
                inputs.scheduler(),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the pictures. Higher shows the prompts more clearly and makes a longer "
                    "direction; the other prompt is the negative.",
                ),
                layer(),
            ],
            outputs=[found()],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, steps, scheduler, cfg, layer) -> io.NodeOutput:
        import latent_preview

        sigmas = inputs.sigmas_of(model, scheduler, steps)
        callback = latent_preview.prepare_callback(model, steps)
        return io.NodeOutput(
            direction.of_prompts(model, positive, negative, noise, latent, sigmas, cfg, layer, callback)
        )


class HSpaceDirectionOfPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerHSpaceDirectionOfPictures",
            display_name="h-space Direction of Pictures",
            category="steer/hspace",
            description="Keeps what the features of two kinds of pictures differ in; or, with one kind alone, a "
            "direction along which they vary most. For SteerAsyrp.",
            search_aliases=["h-space", "Asyrp", "semantic direction", "PCA", "principal component", "slider"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet (SD1.x, SD2.x, SDXL)."),
                io.Conditioning.Input(
                    "positive", tooltip="A prompt that fits all of the pictures. An empty one will do."
                ),
                io.Latent.Input(
                    "latent", tooltip="Pictures that have it, encoded, as one batch. More give a cleaner direction."
                ),
                io.Latent.Input(
                    "other",
                    optional=True,
                    tooltip="Pictures that lack it. Without them, a principal direction of the first ones is found.",
                ),
                io.Noise.Input("noise", tooltip="Noise under which both kinds are compared."),
                inputs.steps(STEPS, 20),
                inputs.scheduler(),
                io.Int.Input(
                    "component",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Of the principal directions: 1 is where the pictures vary most, higher ones are finer. "
                    "Not used where other is wired.",
                ),
                layer(),
            ],
            outputs=[found()],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, noise, steps, scheduler, component, layer, other=None
    ) -> io.NodeOutput:
        sigmas = inputs.sigmas_of(model, scheduler, steps)
        return io.NodeOutput(
            direction.of_pictures(model, positive, noise, latent, other, sigmas, layer, component)
        )


NODES = [HSpaceDirection, HSpaceDirectionOfPictures]
