from comfy_api.latest import io

from ...patches.inversion import invert, rfinversion
from .. import inputs


class RFInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerRFInversion",
            display_name="RF-Inversion",
            category="steer/inversion",
            description="Finds noise from which a flow model (Flux, SD3) redraws a picture, pulled towards ordinary "
            "random noise so that the model can also draw something else from it. Wire noise and sigmas to "
            "SamplerCustomAdvanced beside the same latent, and RF-Inversion Controller to the model, which pulls the "
            "new picture towards the old one.",
            search_aliases=[
                "RF-Inversion", "rectified flow inversion", "semantic image inversion", "unsampler", "controlled ODE",
                "flow inversion", "real image editing",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The flow model that will edit the picture, with its LoRAs."),
                io.Conditioning.Input("positive", tooltip="The paper's is an empty prompt. One that describes the "
                                      "picture inverts it more exactly."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Noise.Input("noise", tooltip="RandomNoise: where gamma pulls to."),
                io.Float.Input(
                    "gamma",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Pull towards the noise. Higher ends in noise that is more ordinary, which edits better "
                    "and keeps less of the picture; 0 is plain inversion, 1 the noise itself.",
                ),
                inputs.steps("More steps invert more exactly and take longer. Ignored when sigmas are wired."),
                inputs.scheduler(" Ignored when sigmas are wired."),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The sampler's own sigmas, in place of steps and scheduler. They end at 0.",
                ),
            ],
            outputs=[
                io.Noise.Output(
                    display_name="noise",
                    tooltip="For SamplerCustomAdvanced, beside the latent that was inverted, with all of the sigmas.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule that was inverted, for the sampler."),
                io.Custom("STEER_TRAJECTORY").Output(
                    display_name="trajectory",
                    tooltip="The latent at every step, for RF-Inversion Controller and other editing nodes.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, latent, noise, gamma, steps, scheduler, sigmas=None) -> io.NodeOutput:
        import latent_preview

        if sigmas is None:
            sigmas = inputs.sigmas_of(model, scheduler, steps)
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        drawn = noise.generate_noise(latent)
        found = rfinversion.invert(model, positive, latent["samples"], sigmas, drawn, gamma, callback)
        return io.NodeOutput(invert.InvertedNoise(found, model), sigmas, found)


class RFController(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerRFController",
            display_name="RF-Inversion Controller",
            category="steer/inversion",
            description="Pulls what the sampler draws towards the picture that was inverted, in the early steps. What "
            "is decided there, the layout and the face, stays; the prompt decides the rest.",
            search_aliases=["RF-Inversion", "rectified flow inversion", "LQR controller", "eta", "pull to image"],
            inputs=[
                io.Model.Input("model", tooltip="The flow model with which the picture was inverted."),
                io.Custom("STEER_TRAJECTORY").Input("trajectory", tooltip="From RF-Inversion or Invert: the picture."),
                io.Float.Input(
                    "eta",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Pull towards the picture. Higher keeps more of it; 1 in all steps returns it, 0 is off.",
                ),
                *inputs.window(end=0.25),
                inputs.curve("eta"),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, trajectory, eta, start_percent, end_percent, curve=None) -> io.NodeOutput:
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(rfinversion.apply(model, trajectory, eta, schedule))


NODES = [RFInversion, RFController]
