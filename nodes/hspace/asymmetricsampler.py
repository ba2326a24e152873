from comfy_api.latest import io

from ...patches.hspace import asymmetricsampler


class AsymmetricSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerAsymmetricSampler",
            display_name="Asymmetric Reverse Process Sampler",
            category="steer/hspace",
            description="The sampler for edits of a network's features (SteerInjectFusion, SteerAsyrp): the edit "
            "changes the clean estimate of each step, and the noise that is kept stays the unedited network's, so "
            "that edits show. Where nothing is edited it is euler.",
            search_aliases=[
                "Asyrp", "asymmetric sampler", "latent calibration", "quality boost", "InjectFusion", "h-space",
            ],
            inputs=[
                io.Boolean.Input(
                    "calibration",
                    default=False,
                    tooltip="Latent calibration: makes the unedited network draw the edit, from a latent moved towards "
                    "it. Cleaner where an edit leaves artefacts, and weaker; one more evaluation per edited step.",
                ),
                io.Float.Input(
                    "omega",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Of calibration: how much of the edit is held back. Higher keeps more of the original; "
                    "at 1 only its contrast is corrected.",
                ),
                io.Float.Input(
                    "boost_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Quality boost: from this share of the sampling range on, each step renews its noise. 0.8 "
                    "is the paper's; lower redraws more, and loses detail of the original. 1 is off.",
                    advanced=True,
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, calibration, omega, boost_percent) -> io.NodeOutput:
        return io.NodeOutput(asymmetricsampler.sampler(calibration, omega, boost_percent))


NODES = [AsymmetricSampler]
