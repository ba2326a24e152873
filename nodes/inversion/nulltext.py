from comfy_api.latest import io

from ...patches.inversion import nulltext
from .. import inputs


class NullTextInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerNullText",
            display_name="Null-text Inversion",
            category="steer/inversion",
            description="Finds, by gradients, a negative for every step under which the sampler keeps to the path of "
            "an inverted picture at your cfg. The prompt is left alone, so it can be edited freely afterwards. Takes a "
            "while: try Negative-prompt Inversion first.",
            search_aliases=["NTI", "null-text optimization", "null text", "unconditional embedding", "pivotal"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model with which the picture was inverted: not quantised, and from before "
                    "other Steer nodes.",
                ),
                inputs.trajectory(),
                io.Conditioning.Input(
                    "negative", tooltip="Where the search begins: the empty prompt, as in the paper, or your negative."
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The cfg with which you will sample. Higher edits more strongly, and is harder to keep on "
                    "the path: give it more iterations.",
                ),
                io.Int.Input(
                    "iterations",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="At most so many per step, each about three times the work of one row. Higher keeps the "
                    "picture more exactly; steps that are close enough stop earlier.",
                ),
                io.Float.Input(
                    "lr",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="How far the negative moves per iteration, in standard deviations of it. Higher gets there "
                    "in fewer iterations, and too high never settles. 0 leaves the negative as it is.",
                    advanced=True,
                ),
                inputs.source(),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="For the sampler's negative, with euler and the noise and sigmas of SteerInvert.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, trajectory, negative, cfg, iterations, lr, source=None) -> io.NodeOutput:
        import latent_preview

        callback = latent_preview.prepare_callback(model, len(trajectory.sigmas) - 1)
        found = nulltext.apply(model, trajectory, negative, cfg, iterations, lr, source, callback)
        return io.NodeOutput(found)


NODES = [NullTextInversion]
