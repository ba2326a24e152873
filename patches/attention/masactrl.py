"""MasaCtrl (Cao et al. 2023, arXiv 2304.08465): the target asks, the source picture answers."""

from dataclasses import dataclass, field

import torch

from ..shared.architectures import flux, hunyuan, lumina, qwen, sd3, self_attention_layers, unet, wan
from ..shared.attention import Attention, biased, image_from
from ..shared.conditioning import digest
from ..shared.mask import fit, on_tokens
from ..shared.source import covers, source_from
from ..shared.steering import Source, Term, blame, number, steer
from ..shared.textattention import answers, around

DIT = dict.fromkeys((a.name for a in (flux, sd3, lumina, qwen, wan, hunyuan)), "50%-100%")  # the paper has none of them


def auto(model):
    """{adapter name: layers} of "auto". On a UNet the decoder's from half the latent's resolution on: the paper's
    layers 10-15 of 16 in Stable Diffusion, output.6-11, and the last six of 70 in SDXL."""
    network = model.get_model_object("diffusion_model")
    return DIT | {unet.name: f"output.{half(network)}-{len(network.output_blocks)}"} if unet.matches(network) else DIT


def half(network):
    """Number of the first output block of a UNet after which the resolution is at most doubled."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Upsample

    doubles = [any(isinstance(module, Upsample) for module in block) for block in network.output_blocks]
    return next(i for i in range(len(doubles)) if sum(doubles[i:]) <= 1)


@dataclass(frozen=True)
class MasaCtrl(Term):
    """softmax(q_t k_s^T) v_s in `layers`, for the positive and the negative alike (equation 2): keys and values of the
    image are the source's, mixed in by `strength`.

    With masks m_s and m_t of the foreground in source and target (section 3.3), what the source's foreground answers
    counts where m_t is 1, what its background answers where m_t is 0. A layer on whose grid the source has nothing of a
    kind answers with all it has.
    """

    source: Source = None
    strength: float = 1.0
    layers: str = "auto"
    regions: str = ""  # tells masks apart
    masks: tuple = field(default=None, compare=False, repr=False)  # (m_s, m_t), each [b, h, w]
    node = "SteerMasaCtrl"
    edits = True

    def check(self):
        number("strength", self.strength, 0.0, 1.0)

    @property
    def off(self):
        return super().off or self.strength == 0.0

    def prepare(self, run):
        covers(self.source, run)
        for mask in self.masks or ():
            fit(mask, run.shape)

    def branches(self, model):
        return (self.source,)

    def attention(self, model):
        layers = self_attention_layers(model, self.layers, auto(model))
        return (Attention("self", layers, self.edit, ("keys", "values"), (self.source,)),)

    def edit(self, target, beside, attend, call, weight, role):
        mutual = image_from(*beside, target, "kv", self.strength * weight)
        if self.masks is None:
            return attend(mutual)
        with blame(self):
            m_s, m_t = (on_tokens(fit(mask, call.run.shape), target) for mask in self.masks)
        m_t = m_t[..., None].to(target.q.dtype)
        image, others = slice(*target.image), around(target)
        out = target.q.new_empty(target.q.shape)
        if len(others):  # text goes on asking everything
            out[:, others] = answers(attend, mutual, others)
        foreground, background = (answers(attend, only(mutual, m), image) for m in (m_s > 0, m_s < 1))
        out[:, image] = foreground * m_t + background * (1 - m_t)
        return out


def only(call, places):
    """The call without the keys of image tokens that are not in `places` [b, N], where there are any in it."""
    places = places | ~places.any(1, keepdim=True)
    bias = torch.zeros(len(places), call.k.shape[1], device=call.k.device)
    bias[:, slice(*call.image)].masked_fill_(~places, float("-inf"))
    return biased(call, bias)


def apply(model, trajectory, strength, layers, schedule, source=None, source_mask=None, target_mask=None):
    masks = source_mask, target_mask
    with blame(MasaCtrl):
        if (source_mask is None) != (target_mask is None):
            there, missing = ("source", "target") if target_mask is None else ("target", "source")
            raise ValueError(
                f"{there}_mask needs {missing}_mask beside it: where the foreground is in both pictures; wire both or "
                "none."
            )
        branch = source_from(model, trajectory, source)
    given = source_mask is not None
    regions, masks = (digest(masks), masks) if given else ("", None)
    return steer(model, MasaCtrl(schedule, branch, strength, layers, regions, masks))
