from comfy_api.latest import io

from ...patches.measurement import reward
from ...patches.shared.energy import push
from .. import energies, inputs


class Reward(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerReward",
            display_name="Reward Guidance",
            category="steer/measurement",
            description="Moves every step's clean estimate towards what a scorer likes better, by the slope of the "
            "score. Any model, any sampler; several rewards add up.",
            search_aliases=[
                "reward", "universal guidance", "FreeDoM", "energy", "loss guidance", "scorer", "aesthetic", "DNO",
            ],
            inputs=[
                energies.model(),
                io.Custom("STEER_SCORER").Input(
                    "scorer", tooltip="What judges the pictures, such as Lab Scorer for the lab's portraits."
                ),
                energies.strength("towards a higher score"),
                *energies.how(),
                *energies.more("the score"),
            ],
            outputs=[energies.output()],
        )

    @classmethod
    def execute(
        cls, model, scorer, strength, gradient, norm, every, recurrence, start_percent, end_percent, mask=None,
        curve=None,
    ) -> io.NodeOutput:
        how = push(strength, gradient, norm, every, recurrence, mask)
        schedule = inputs.schedule(start_percent, end_percent, curve)
        return io.NodeOutput(reward.apply(model, scorer, how, schedule))


NODES = [Reward]
