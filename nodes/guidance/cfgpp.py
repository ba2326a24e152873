from comfy_api.latest import io

from ...patches.guidance import cfgpp
from .. import inputs


class CFGPlusPlus(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerCFGPP",
            display_name="CFG++",
            category="steer/guidance",
            description="Guidance that stays on the data manifold: interpolates with a strength below 1 instead of "
            "extrapolating with a cfg of 5 or more, and renoises with the unguided prediction. Smoother paths, "
            "natural colours, good inversion. For the samplers euler and ddim; SteerCFGPPSampler has others.",
            search_aliases=["CFG++", "CFGPP", "manifold constrained guidance", "euler_cfg_pp"],
            inputs=[
                io.Model.Input("model", tooltip="Any eps, v or flow model."),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="The paper's lambda, in place of the sampler's cfg, which is not used inside the window. "
                    "Higher follows the prompt more; the paper sets 0.6 beside cfg 7.5, 1 beside 12.5. 0 is off.",
                ),
                *inputs.window(),
            ],
            outputs=[io.Model.Output(tooltip="The model, steered. Wire it to KSampler or a CFGGuider.")],
        )

    @classmethod
    def execute(cls, model, strength, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(cfgpp.apply(model, strength, inputs.schedule(start_percent, end_percent)))


class CFGPlusPlusSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerCFGPPSampler",
            display_name="CFG++ Sampler",
            category="steer/guidance",
            description="Samplers that take the CFG++ step of a model that carries SteerCFGPP. Outside its window "
            "they are the plain sampler.",
            search_aliases=["CFG++", "CFGPP", "dpmpp_2m_cfg_pp", "euler_ancestral_cfg_pp"],
            inputs=[
                io.Combo.Input(
                    "sampler_name",
                    options=list(cfgpp.SOLVERS),
                    default="dpmpp_2m",
                    tooltip="euler: the paper's step. euler_ancestral: with fresh noise. dpmpp_2m: second order, "
                    "fewer steps for the same quality.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fresh noise of euler_ancestral: higher varies more between steps, 0 is euler.",
                    advanced=True,
                ),
                io.Float.Input(
                    "s_noise",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Multiplies the fresh noise of euler_ancestral: above 1 adds texture, below 1 smooths.",
                    advanced=True,
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler_name, eta, s_noise) -> io.NodeOutput:
        return io.NodeOutput(cfgpp.sampler(sampler_name, eta, s_noise))


NODES = [CFGPlusPlus, CFGPlusPlusSampler]
