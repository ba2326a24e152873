from comfy_api.latest import io

from ...models.measurement import timepredictor
from ...patches.measurement import temporalalignment
from ...patches.shared.energy import push
from .. import adapters, energies, inputs


class TemporalAlignment(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerTemporalAlignment",
            display_name="Temporal Alignment Guidance",
            category="steer/measurement",
            description="Holds each step's latent to the noise level at which the model is asked, as a time predictor "
            "sees it: a repair for runs that strong guidance, rewards or few steps have driven off.",
            search_aliases=[
                "temporal alignment", "TAG", "time predictor", "time-linked score", "TLS", "off-manifold",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any model of pictures for which there is a time predictor."),
                io.Custom("STEER_TIME_PREDICTOR").Input(
                    "predictor", tooltip="From Load Time Predictor: trained for this model's noisy latents."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="Weight of the slope of the time's log-probability. Higher holds the level more closely, "
                    "too high makes the latent swing around it and breaks the picture. 0 is off.",
                ),
                io.Combo.Input(
                    "form",
                    options=list(temporalalignment.FORMS),
                    default=temporalalignment.FORMS[0],
                    tooltip="score: a part of the score, for every sampler. sample: moves the sample itself before the "
                    "step, as the paper's algorithm, for euler and ddim; stronger at the same strength.",
                ),
                energies.every(),
                *inputs.window(),
                *energies.more("the correction"),
            ],
            outputs=[energies.output()],
        )

    @classmethod
    def execute(
        cls, model, predictor, strength, form, every, start_percent, end_percent, mask=None, curve=None
    ) -> io.NodeOutput:
        how = push(strength, norm="none", every=every, mask=mask)
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(temporalalignment.apply(model, predictor, form, how, schedule))


class LoadTimePredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLoadTimePredictor",
            display_name="Load Time Predictor",
            category="steer/measurement",
            description="Reads a small network that tells how noisy a latent is, trained for the noisy latents of one "
            "model. The lab's own are marked [lab].",
            search_aliases=["time predictor", "noise level classifier", "timestep classifier", "temporal alignment"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=adapters.time_predictors(),
                    tooltip="Safetensors files of models/time_predictors; the help page says what such a file holds. "
                    "time is for the lab's UNets, time_dit for its DiTs.",
                ),
            ],
            outputs=[
                io.Custom("STEER_TIME_PREDICTOR").Output(
                    display_name="predictor", tooltip="For Temporal Alignment Guidance."
                ),
                io.String.Output(display_name="found", tooltip="What the file is and which models it is for."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        if file is None or adapters.path_of(file, adapters.TIMES) is not None:
            return True
        return f"there is no time predictor {file!r}; put it into models/time_predictors"

    @classmethod
    def fingerprint_inputs(cls, file=None):
        path = None if file is None else adapters.path_of(file, adapters.TIMES)
        return "" if path is None else f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        path = adapters.path_of(file, adapters.TIMES)
        if path is None:
            raise ValueError(
                f"SteerLoadTimePredictor: there is no time predictor {file!r}; put it into models/time_predictors."
            )
        try:
            predictor = timepredictor.load(path)
        except ValueError as error:
            raise ValueError(f"SteerLoadTimePredictor: {error}") from error
        return io.NodeOutput(predictor, str(predictor), ui={"text": [str(predictor)]})


NODES = [TemporalAlignment, LoadTimePredictor]
