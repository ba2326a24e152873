from comfy_api.latest import io

from ...patches.measurement import measurement
from ...patches.shared.energy import push
from .. import energies, inputs

SOURCES = {"to be measured": True, "the measurement": False}


class Measurement(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerMeasurement",
            display_name="Measurement Guidance (DPS, DDNM)",
            category="steer/measurement",
            description="Makes pictures that agree with a measurement: a small one enlarged, a part continued, grey "
            "coloured, blur undone. soft goes down the error (DPS), hard projects onto what was measured (DDNM).",
            search_aliases=[
                "DPS", "DDNM", "inverse problem", "diffusion posterior sampling", "super resolution", "deblur",
                "colorize", "restoration", "projection", "consistency",
            ],
            inputs=[
                energies.model(),
                io.Custom("STEER_OPERATOR").Input("operator", tooltip="What was measured, from SteerOperator."),
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    default="to be measured",
                    tooltip="What is wired to image or latent: a picture that the operator shall measure, or the "
                    "measurement itself, such as the small picture.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(measurement.MODES),
                    default="soft",
                    tooltip="soft: goes down the error; any operator. hard: projects at each step; not for blur and "
                    "Fourier magnitude. It is exact on a latent; an image goes through the VAE, which loses some.",
                ),
                energies.strength("towards the measurement"),
                io.Float.Input(
                    "sigma_y",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Noise of the measurement, for norm none: higher trusts it less. 0 weighs the error as DPS "
                    "does, by its root.",
                    advanced=True,
                ),
                *energies.how(recurrence=2),
                *energies.more("the measurement"),
                io.Vae.Input(
                    "vae", optional=True, tooltip="For an image: the model's VAE, or a TAESD of its kind, faster."
                ),
                io.Image.Input("image", optional=True, tooltip="Measured in pictures, by way of the VAE."),
                io.Latent.Input("latent", optional=True, tooltip="In place of an image: measured in latents, exactly."),
            ],
            outputs=[energies.output()],
        )

    @classmethod
    def execute(
        cls, model, operator, source, mode, strength, sigma_y, gradient, norm, every, recurrence, start_percent,
        end_percent, mask=None, curve=None, vae=None, image=None, latent=None,
    ) -> io.NodeOutput:
        how = push(strength, gradient, norm, every, recurrence, mask)
        schedule = inputs.schedule(start_percent, end_percent, curve)
        latent = None if latent is None else latent["samples"]
        return io.NodeOutput(
            measurement.apply(
                model, operator, how, schedule, mode, sigma_y, image, latent, vae, SOURCES[source]
            )
        )


NODES = [Measurement]
