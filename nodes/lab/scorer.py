from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ...patches.shared.decode import Decoder, decoder


@dataclass(frozen=True)
class LabScorer:
    """A `Scorer`: the mean log-probability that the lab's reader gives to the factors that `prompt` names. Also
    `Features`: what the reader itself looks at."""

    prompt: str
    decoder: Decoder = field(repr=False)
    reader: Any = field(repr=False)

    @property
    def patchers(self):
        return (self.decoder.patcher,)

    def __call__(self, latents):
        images = self.decoder(latents)
        return self.reader.to(images.device).score(images, self.prompt)

    def features(self, pictures):
        return self.reader.to(pictures.device).features(pictures)


class LabScorerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLabScorer",
            display_name="Lab Scorer",
            category="steer/lab",
            description="Judges how well a portrait of the lab fits a prompt, for nodes that are guided by a scorer. "
            "On anything but the lab's portraits its judgement means nothing.",
            search_aliases=["lab", "scorer", "reward", "judge", "evaluator"],
            inputs=[
                io.Vae.Input("vae", tooltip="The lab's VAE: what is judged is the decoded picture."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="What the picture should show. Every factor that it names counts the same.",
                ),
            ],
            outputs=[io.Custom("STEER_SCORER").Output(display_name="scorer", tooltip="0 is a perfect fit.")],
        )

    @classmethod
    def execute(cls, vae, prompt) -> io.NodeOutput:
        from ...models.lab.captions import parse
        from ...models.lab.reader import load_reader

        if not parse(prompt):
            raise ValueError(
                f"SteerLabScorer: the prompt {prompt!r} names nothing that the lab's portraits show; write it as Lab "
                'Portrait does, for example "a happy person, red hair, glasses".'
            )
        return io.NodeOutput(LabScorer(prompt, decoder(vae), load_reader()))


NODES = [LabScorerNode]
