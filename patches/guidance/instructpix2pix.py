"""InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): guidance by an image and by an instruction, apart."""

import uuid
from dataclasses import dataclass

from ..shared.steering import Term, Text, number, steer

IMAGE = "concat_latent_image"  # InstructPix2Pix and kin: channels beside the noisy latent
REFERENCE = "reference_latents"  # Flux Kontext, Qwen-Image-Edit and kin: tokens beside the noisy ones


@dataclass(frozen=True)
class InstructPix2Pix(Term):
    """e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0)), equation 3 of the paper, on clean estimates.

    The sampler's positive is (I,T), its negative (I,0) and its cfg s_T: it does e(I,0) + s_T (e(I,T) - e(I,0)), and
    (s_I - 1)(e(I,0) - e(0,0)) is added, with (0,0) the negative whose image is taken away.
    """

    s_I: float = 1.5
    node = "SteerInstructPix2Pix"
    needs_negative = True
    exclusive = True

    @property
    def off(self):
        return super().off or self.s_I == 1.0

    def check(self):
        number("image_scale", self.s_I)

    def prepare(self, run):
        for name in ("positive", "negative"):
            if not any(has_image(cond) for cond in run.guider.original_conds[name]):
                raise ValueError(
                    f"the {name} conditioning has no image; pass it through InstructPixToPixConditioning, "
                    "ReferenceLatent or the edit encoder of the model."
                )

    def branches(self, model):
        return (Text("no-image", "negative", blind_negative),)

    def add(self, call, predictions, weight):
        return (call.predictions["negative"] - predictions[0]) * ((self.s_I - 1) * weight)


def has_image(cond):
    return cond.get(IMAGE) is not None or bool(cond.get(REFERENCE))


def blind_negative(guider):
    """The negative of the run without its image, as a conditioning of its own."""
    return [without_image(cond) for cond in guider.conds["negative"]]


def without_image(cond):
    cond = {name: value for name, value in cond.items() if name != REFERENCE}
    if cond.get(IMAGE) is not None:
        cond[IMAGE] = cond[IMAGE].new_zeros(cond[IMAGE].shape)  # as in training, where it was dropped
    return {**cond, "uuid": uuid.uuid4()}


def apply(model, s_I, schedule):
    return steer(model, InstructPix2Pix(schedule, s_I))
