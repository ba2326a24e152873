from comfy_api.latest import io

from ...patches.inversion import editfriendly
from .. import inputs


class EditFriendly(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerEditFriendly",
            display_name="Edit-friendly DDPM Inversion",
            category="steer/inversion",
            description="Finds the noise maps from which the model draws a picture step by step, and gives a sampler "
            "that draws with them: the same prompt and cfg return the picture exactly, another prompt edits it. Wire "
            "sampler and sigmas to SamplerCustomAdvanced with the same latent; its noise does not matter.",
            search_aliases=[
                "edit-friendly DDPM inversion", "DDPM inversion", "edit friendly", "LEDITS", "stochastic inversion",
                "real image editing",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that will edit the picture, with its LoRAs."),
                io.Conditioning.Input(
                    "positive", tooltip="A prompt that describes the picture as it is. The closer, the better it edits."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt of the sampler, mostly empty."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Noise.Input("noise", tooltip="RandomNoise: its seed draws the noise. Other seeds, other edits."),
                io.Float.Input(
                    "cfg",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance while the maps are found. Higher keeps more of the picture when the sampler's "
                    "cfg is high too; the paper has 3.5 here and 15 there.",
                ),
                inputs.steps("More steps keep more of the picture and edit finer. Ignored when sigmas are wired.", 50),
                inputs.scheduler(" Ignored when sigmas are wired."),
                io.Float.Input(
                    "skip",
                    default=0.36,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Share of the steps that is left out at the start. Higher keeps more of the picture, edits "
                    "less and is faster.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of fresh noise in each step. Higher holds the picture by its noise maps, which "
                    "edits better; 1 is DDPM, the paper's.",
                    advanced=True,
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="In place of steps and scheduler; skip takes their first part off. They end at 0.",
                ),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="Draws with the noise maps of the picture."),
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="The schedule, less what is skipped, for the sampler. It may run their last steps alone.",
                ),
                io.Custom("STEER_TRAJECTORY").Output(
                    display_name="trajectory", tooltip="The noised picture at every step, for Steer's editing nodes."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, noise, cfg, steps, scheduler, skip, eta, sigmas=None
    ) -> io.NodeOutput:
        import latent_preview

        if sigmas is None:
            sigmas = inputs.sigmas_of(model, scheduler, steps)
        sigmas = sigmas[int(skip * (len(sigmas) - 1)) :]
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        samples, seed = latent["samples"], noise.seed
        found = editfriendly.invert(model, positive, negative, samples, sigmas, seed, cfg, eta, callback)
        return io.NodeOutput(found, sigmas, found.trajectory)


NODES = [EditFriendly]
