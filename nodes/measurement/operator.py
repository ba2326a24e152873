from comfy_api.latest import io

from ...patches.measurement import operator


class Operator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerOperator",
            display_name="Measurement Operator",
            category="steer/measurement",
            description="What is known of a picture, as a function of it: a smaller one, a part, grey, blurred, the "
            "magnitude of its Fourier transform, random projections; or one after another. For SteerMeasurement.",
            search_aliases=[
                "inverse problem", "forward operator", "super resolution", "deblur", "inpaint", "colorize",
                "phase retrieval", "compressed sensing", "DPS", "DDNM",
            ],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(operator.KINDS),
                    default="downsample",
                    tooltip="downsample: means over squares. mask: what lies in the mask. grayscale: brightness. blur: "
                    "a Gaussian. Fourier magnitude: without the phase. random projection: a share of each 8x8 block.",
                ),
                io.Int.Input(
                    "factor", default=4, min=2, max=64, tooltip="Of downsample. Higher leaves less of the picture."
                ),
                io.Float.Input(
                    "sigma",
                    default=2.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="Of blur, in pixels (in cells, where a latent is measured). Higher leaves less.",
                ),
                io.Float.Input(
                    "share",
                    default=0.25,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Of random projection: the share of numbers that is known. Lower leaves less.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**32, tooltip="Of random projection.", advanced=True),
                io.Mask.Input("mask", optional=True, tooltip="Of the kind mask: 1 where the picture is known."),
                io.Custom("STEER_OPERATOR").Input(
                    "after", optional=True, tooltip="An operator that comes first: this one measures what that gives."
                ),
            ],
            outputs=[io.Custom("STEER_OPERATOR").Output(display_name="operator", tooltip="For SteerMeasurement.")],
        )

    @classmethod
    def execute(cls, kind, factor, sigma, share, seed, mask=None, after=None) -> io.NodeOutput:
        return io.NodeOutput(operator.operator(kind, factor, sigma, share, seed, mask, after))


NODES = [Operator]
