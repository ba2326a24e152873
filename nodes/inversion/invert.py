from comfy_api.latest import io

from ...patches.inversion import invert
from .. import inputs


class Invert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerInvert",
            display_name="Invert",
            category="steer/inversion",
            description="Finds the noise from which the model would draw this very picture, by running the sampler "
            "backwards (DDIM inversion and its better kin). Wire noise and sigmas to SamplerCustomAdvanced with the "
            "euler sampler and the same latent: at cfg 1 and the same prompt the picture comes back; with another "
            "prompt it is edited. The trajectory is what the editing nodes read.",
            search_aliases=[
                "DDIM inversion", "unsampler", "inversion", "invert image to noise", "fixed point inversion", "ReNoise",
                "RF-Solver", "flow inversion", "real image editing",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that will edit the picture, with its LoRAs."),
                io.Conditioning.Input(
                    "positive", tooltip="A prompt that describes the picture as it is. The closer, the better."
                ),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Combo.Input(
                    "method",
                    options=list(invert.METHODS),
                    tooltip="fixed-point: solves each step of the euler sampler backwards, exact up to rounding when "
                    "it has enough iterations. ddim / euler: one evaluation per step, drifts with few steps. "
                    "rf-solver: second order, two evaluations per step, for flow models; sample with SteerRFSolver.",
                ),
                inputs.steps(
                    "More steps bring a picture back more exactly and take longer. Ignored when sigmas are wired."
                ),
                inputs.scheduler(" Ignored when sigmas are wired."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How far up to invert: 1 is pure noise. Lower stops at a partly noised picture, and edits "
                    "then change less.",
                ),
                io.Int.Input(
                    "iterations",
                    default=5,
                    min=1,
                    max=100,
                    tooltip="Of fixed-point: evaluations per step after the first. Higher is more exact, until "
                    "rounding; each costs one more evaluation per step.",
                    advanced=True,
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The sampler's own sigmas, in place of steps, scheduler and denoise. They end at 0.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The inverted latent, for a sampler with DisableNoise. Where inversion goes to pure noise "
                    "on a flow model no sampler can start from it; wire noise instead.",
                ),
                io.Custom("STEER_TRAJECTORY").Output(
                    display_name="trajectory", tooltip="The latent at every step, for Steer's editing nodes."
                ),
                io.Noise.Output(
                    display_name="noise",
                    tooltip="For SamplerCustomAdvanced, beside the latent that was inverted, with all of the sigmas.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule that was inverted, for the sampler."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, method, steps, scheduler, denoise, iterations, sigmas=None
    ) -> io.NodeOutput:
        import latent_preview

        if sigmas is None:
            sigmas = inputs.sigmas_of(model, scheduler, steps, denoise)
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        found = invert.invert(model, positive, latent["samples"], sigmas, method, iterations, callback)
        start = {"samples": invert.start_latent(found, model)}
        return io.NodeOutput(start, found, invert.InvertedNoise(found, model), sigmas)


NODES = [Invert]
