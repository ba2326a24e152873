from comfy_api.latest import io, ui

from ...patches.guidance import report


class SteerReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerReport",
            display_name="Steer Report",
            category="steer/guidance",
            description="Says what steering a model carries, in the order in which it will act, and how many rows "
            "each step will run. After sampling, the log has a line with what was really run.",
            search_aliases=["debug", "inspect", "forwards", "NFE", "cost"],
            inputs=[
                io.Model.Input("model", tooltip="A model, steered or not."),
                io.Boolean.Input(
                    "cfg",
                    default=True,
                    tooltip="On when the sampler's cfg is not 1, so that a negative row runs in each step. Only the "
                    "text depends on it.",
                ),
                io.Boolean.Input(
                    "share_prefix",
                    default=True,
                    tooltip="On: blocks before the first that a branch perturbs are computed once for it and the "
                    "positive. Off: every branch is computed from the start, which is slower and needed only beside a "
                    "node whose patch lets rows of one batch act on each other.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model, with share_prefix as set."),
                io.String.Output(display_name="text", tooltip="The report."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, cfg, share_prefix=True) -> io.NodeOutput:
        model = report.sharing(model, share_prefix)
        text = report.describe(model, cfg)
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))


NODES = [SteerReport]
