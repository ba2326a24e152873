from comfy_api.latest import io

from ...patches.measurement import classifierguidance
from ...patches.shared.energy import push
from .. import energies, inputs


class ClassifierGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerClassifierGuidance",
            display_name="Classifier Guidance",
            category="steer/measurement",
            description="Moves every step's clean estimate to where a classifier is surer of a class: one trained on "
            "noisy latents, as the paper's, or any that knows clean pictures.",
            search_aliases=["classifier guidance", "noisy classifier", "Dhariwal", "class conditional", "ADM"],
            inputs=[
                energies.model(),
                io.Custom("STEER_SCORER").Input(
                    "classifier",
                    tooltip="A scorer that answers with log-probabilities: of noisy latents, or, as Lab Scorer, of "
                    "clean pictures.",
                ),
                energies.strength("towards the class"),
                *energies.how(),
                *energies.more("the classifier"),
            ],
            outputs=[energies.output()],
        )

    @classmethod
    def execute(
        cls, model, classifier, strength, gradient, norm, every, recurrence, start_percent, end_percent, mask=None,
        curve=None,
    ) -> io.NodeOutput:
        how = push(strength, gradient, norm, every, recurrence, mask)
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(classifierguidance.apply(model, classifier, how, schedule))


NODES = [ClassifierGuidance]
