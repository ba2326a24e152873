from comfy_api.latest import io

from ...patches.inversion import rfsolver


class RFSolver(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerRFSolver",
            display_name="RF-Solver",
            category="steer/inversion",
            description="A second-order sampler: each step looks ahead to its middle. It retraces an inversion by "
            "Invert with the method rf-solver, and draws more exactly than euler in as many steps, with two "
            "evaluations each.",
            search_aliases=["RF-Solver", "RF-Edit", "midpoint", "second order", "flow sampler", "rectified flow"],
            inputs=[],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(rfsolver.sampler())


NODES = [RFSolver]
