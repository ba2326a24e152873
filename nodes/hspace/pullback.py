from comfy_api.latest import io

from ...patches.hspace import pullback


class Pullback(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerPullback",
            display_name="Local Latent Basis by Pullback",
            category="steer/hspace",
            description="Finds, at one noise level of an inverted picture, the directions of its latent that change "
            "the features at the bottom of the UNet most, and walks along one of them: edits without a prompt, a "
            "reference or training. Wire latent and sigmas to SamplerCustomAdvanced with DisableNoise and euler.",
            search_aliases=[
                "pullback", "Riemannian geometry", "local latent basis", "Jacobian", "unsupervised editing", "h-space",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A UNet (SD1.x, SD2.x, SDXL)."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="Prompt under which the directions are found and walked: the one of the sampler. What it "
                    "names holds still; a prompt that names less leaves more to change.",
                ),
                io.Custom("STEER_TRAJECTORY").Input("trajectory", tooltip="The picture, from SteerInvert."),
                io.Float.Input(
                    "percent",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where on the trajectory to leave it, as a share of the sampling range. Lower changes more "
                    "and larger things, higher keeps more. The paper takes 0.3 to 0.4.",
                ),
                io.Int.Input(
                    "component",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Which direction: 1 moves the features most, higher ones less.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.3,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How far to walk, as a share of the latent's length. Higher changes more, below 0 walks "
                    "the other way; above about 0.5 pictures break. 0 leaves the trajectory as it is.",
                ),
                io.Int.Input(
                    "iterations",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="Steps of the walk. More follow the curved space more closely and take longer: one forward "
                    "of two rows each.",
                ),
                io.Int.Input(
                    "directions",
                    default=64,
                    min=1,
                    max=4096,
                    tooltip="Size of the space that is searched: this many of the smoothest changes of the latent. "
                    "More find finer directions and take longer: two rows each.",
                    advanced=True,
                ),
                io.String.Input(
                    "layer",
                    default="middle",
                    tooltip='The block whose features must move: "middle" is the h-space. Later blocks such as '
                    '"output.2" find directions of finer detail.',
                    advanced=True,
                ),
                io.Combo.Input(
                    "method",
                    options=list(pullback.METHODS),
                    tooltip="finite differences: the best directions among the smoothest ones, without gradients. "
                    "power method: the paper's, the best of all, finer; needs gradients, more memory and several times "
                    "as long.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="The moved latent, with its noise: for a sampler with DisableNoise."
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The rest of the trajectory's schedule."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, trajectory, percent, component, strength, iterations, directions, layer, method
    ) -> io.NodeOutput:
        import latent_preview

        callback = latent_preview.prepare_callback(model, iterations)
        latent, sigmas = pullback.edit(
            model, positive, trajectory, percent, component, strength, iterations, directions, layer, method, callback
        )
        return io.NodeOutput({"samples": latent}, sigmas)


NODES = [Pullback]
