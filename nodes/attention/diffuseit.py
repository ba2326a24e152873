from comfy_api.latest import io

from ...patches.attention import diffuseit
from .. import inputs


class DiffuseIT(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerDiffuseIT",
            display_name="DiffuseIT: Disentangled Style and Content",
            category="steer/attention",
            description="Holds the structure of a source picture by what another network (CLIP, DINOv2) sees at each "
            "place of it, on every model and without inversion; looks come from the prompt, or from a target picture.",
            search_aliases=[
                "DiffuseIT", "ViT guidance", "DINO keys", "structure loss", "self-similarity", "image translation",
                "external guidance",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any model of pictures."),
                io.Vae.Input("vae", tooltip="The model's VAE: the estimate of each step is decoded and looked at."),
                io.Image.Input("image", tooltip="The source whose structure is held; one, or one for each."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How far each step moves its estimate, in standard deviations of it. Higher follows source "
                    "and target more closely, too high breaks the picture. 0 is off.",
                ),
                io.Float.Input(
                    "structure",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Weight of the source's structure against the target's looks. Higher holds more of it.",
                    advanced=True,
                ),
                io.Float.Input(
                    "appearance",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Weight of the target's looks. Higher takes more of them; without a target it is not used.",
                    advanced=True,
                ),
                *inputs.window(0.0, 0.9),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The network that looks, from Load CLIP Vision: a DINOv2, as the paper's, or a CLIP.",
                ),
                io.Custom("STEER_SCORER").Input(
                    "scorer",
                    optional=True,
                    tooltip="In its place a scorer that has features, such as Lab Scorer for the lab's portraits.",
                ),
                io.Image.Input(
                    "target", optional=True, tooltip="A picture whose looks are taken; without it, the prompt's."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Any sampler, any noise.")],
        )

    @classmethod
    def execute(
        cls, model, vae, image, strength, structure, appearance, start_percent, end_percent, clip_vision=None,
        scorer=None, target=None,
    ) -> io.NodeOutput:
        if (clip_vision is None) == (scorer is None):
            raise ValueError("SteerDiffuseIT: wire either clip_vision or scorer: one network looks at the pictures.")
        schedule = inputs.schedule(start_percent, end_percent)
        eyes = scorer if clip_vision is None else clip_vision
        return io.NodeOutput(
            diffuseit.apply(model, vae, image, strength, structure, appearance, schedule, eyes, target)
        )


NODES = [DiffuseIT]
