from comfy_api.latest import io

from ...patches.inversion import flowedit


class FlowEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerFlowEdit",
            display_name="FlowEdit: Inversion-Free Text-Based Editing",
            category="steer/inversion",
            description="Edits a picture from one prompt to another without inverting it: at each noise level the "
            "model is asked what it would draw for either prompt from the same noise, and the picture moves by the "
            "difference. What both prompts share stays. Wire guider and sampler to SamplerCustomAdvanced with the "
            "sigmas of the whole schedule and the latent of the picture; a noise node gives the seed.",
            search_aliases=[
                "FlowEdit", "DDCM", "InfEdit", "inversion-free editing", "virtual inversion", "image editing",
                "real image editing", "text-based editing",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that edits, with its LoRAs."),
                io.Conditioning.Input(
                    "source", tooltip="A prompt that describes the picture as it is. The closer, the more of it stays."
                ),
                io.Conditioning.Input("positive", tooltip="The same prompt with what shall be different."),
                io.Conditioning.Input("negative", tooltip="What to keep away from, for both prompts; mostly empty."),
                io.Float.Input(
                    "source_cfg",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance towards the source prompt. Higher takes more of what it names out of the "
                    "picture. Models with distilled guidance want 1 here, and their own guidance (Flux: 1.5) in the "
                    "conditioning.",
                ),
                io.Float.Input(
                    "target_cfg",
                    default=5.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance towards the positive prompt. Higher edits more and harsher. SD3: 13.5 beside "
                    "3.5. Models with distilled guidance: 1, and Flux's own 5.5 in the conditioning. DDCM: 2 to 3.",
                ),
                io.Int.Input(
                    "n_max",
                    default=16,
                    min=0,
                    max=10000,
                    tooltip="How many of the sampler's last steps edit. Higher changes layout too; lower keeps the "
                    "picture, and costs less. Papers: 24 of 28 on Flux, 33 of 50 on SD3. 0 returns it as it is; more "
                    "than there are is all of them.",
                ),
                io.Int.Input(
                    "n_min",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="How many of the sampler's last steps draw freely towards the positive prompt. Higher lets "
                    "details and textures become those of the prompt (styles), and keeps less of the picture.",
                    advanced=True,
                ),
                io.Int.Input(
                    "n_avg",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Draws of noise averaged at each step. Higher is smoother and depends less on the seed; "
                    "time grows with it.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "method",
                    options=list(flowedit.METHODS),
                    tooltip="FlowEdit takes small steps, for any model. DDCM (InfEdit) jumps to the edited picture at "
                    "every step, for models that draw in a few steps (LCM); not for ordinary flow models.",
                    advanced=True,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White may change, black stays bit for bit; multiplies the latent's own noise mask.",
                ),
            ],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="Both prompts, for SamplerCustomAdvanced."),
                io.Sampler.Output(display_name="sampler", tooltip="The steps of the edit, for the same node."),
            ],
        )

    @classmethod
    def execute(
        cls, model, source, positive, negative, source_cfg, target_cfg, n_max, n_min, n_avg, method, mask=None
    ) -> io.NodeOutput:
        guider = flowedit.guider(model, source, positive, negative, source_cfg, target_cfg, mask)
        return io.NodeOutput(guider, flowedit.FlowEdit(method, n_max, n_min, n_avg))


NODES = [FlowEdit]
