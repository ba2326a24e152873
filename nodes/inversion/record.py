from comfy_api.latest import io

from ...patches.inversion import record


class RecordTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerRecordTrajectory",
            display_name="Sample and Record Trajectory",
            category="steer/inversion",
            description="SamplerCustomAdvanced that also keeps its path from noise to picture, so that a picture you "
            "generate can be the source of an edit without inversion: wire the trajectory to an editing node, and the "
            "same noise, sigmas and latent to the sampler of the edit.",
            search_aliases=[
                "record sampling", "trajectory of a generated image", "SamplerCustomAdvanced", "edit generated image",
                "prompt to prompt source", "sample trajectory",
            ],
            inputs=[
                io.Noise.Input("noise", tooltip="As for SamplerCustomAdvanced. The edit starts from the same."),
                io.Guider.Input(
                    "guider", tooltip="CFGGuider with the source's prompt, at the cfg that makes a good picture."
                ),
                io.Sampler.Input(
                    "sampler", tooltip="Any that asks the model at every sigma: euler, dpmpp_2m, heun, ... ."
                ),
                io.Sigmas.Input("sigmas", tooltip="They fall to 0. The edit runs the same, or their last steps."),
                io.Latent.Input("latent_image", tooltip="As for SamplerCustomAdvanced; an empty latent to generate."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="What SamplerCustomAdvanced puts out, bit for bit."),
                io.Custom("STEER_TRAJECTORY").Output(
                    display_name="trajectory", tooltip="The latent at every step, for Steer's editing nodes."
                ),
            ],
        )

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image) -> io.NodeOutput:
        from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

        recorder = record.recorder(guider, sampler, sigmas)
        latent = SamplerCustomAdvanced.execute(noise, guider, recorder, sigmas, latent_image).result[0]
        return io.NodeOutput(latent, recorder.trajectory(guider))


NODES = [RecordTrajectory]
