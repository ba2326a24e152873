from comfy_api.latest import io


class LabModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLabModel",
            display_name="Lab Model",
            category="steer/lab",
            description="A tiny text-to-image model that ships with the pack and draws 128x128 cartoon portraits in "
            "seconds on any machine. As a UNet it has the parts and sockets of Stable Diffusion 1.5, as a DiT those of "
            "Flux, so every method can be tried and measured on it. Use a 128x128 empty latent.",
            search_aliases=[
                "lab", "test model", "tiny model", "load lab", "checkpoint", "weak model", "autoguidance", "flux",
                "dit", "rectified flow", "ip2p", "instructpix2pix", "edit",
            ],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=["unet", "unet-weak", "unet-edit", "dit", "dit-weak"],
                    tooltip="unet: the trained UNet. unet-weak: the same network early in its training, for methods "
                    "that guide with a weaker sibling. unet-edit: edits the picture that InstructPixToPixConditioning "
                    "brings, told what shall change. dit: a small Flux, for methods on transformers and flows. "
                    "dit-weak: the same, little trained.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model (unet: eps-prediction; dit: rectified flow)."),
                io.Clip.Output(tooltip="Its text encoder. It knows the words of Lab Portrait's captions."),
                io.Vae.Output(tooltip="Its VAE."),
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        from ...models.lab.load import load_model

        return io.NodeOutput(*load_model(model))


NODES = [LabModel]
