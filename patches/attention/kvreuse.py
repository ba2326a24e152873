"""KV-Edit (Zhu et al. 2025, arXiv 2502.17363): the region that is edited attends to the keys and values that the rest
has in the source, and the rest stays the source's."""

from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import adaptive_max_pool2d

from ..inversion import keepregion
from ..shared.architectures import flux, hunyuan, lumina, qwen, sd3, self_attention_layers, unet, wan
from ..shared.attention import Attention, biased
from ..shared.conditioning import digest
from ..shared.mask import on_tokens
from ..shared.source import covers, source_from
from ..shared.steering import Source, Term, blame, number, steer

AUTO = dict.fromkeys((a.name for a in (unet, flux, sd3, lumina, qwen, wan, hunyuan)), "0%-100%")  # as the paper
KEY = "steer.kvreuse"


class Region(keepregion.Region):
    node = "SteerKVReuse"


@dataclass(frozen=True)
class KVReuse(Term):
    """Keys and values of image tokens outside the region m are the source's, inside it the picture's own (section 3.2).

    bonus: added to the scores of the keys outside (`attn_scale` of the official code).
    """

    source: Source = None
    bonus: float = 0.0
    layers: str = "auto"
    tells: str = ""  # regions apart
    region: Region = field(default=None, compare=False, repr=False)
    node = Region.node
    edits = True

    def check(self):
        number("attention_scale", self.bonus, -50.0, 50.0)

    def prepare(self, run):
        covers(self.source, run)
        self.region.on(run.shape)

    def branches(self, model):
        return (self.source,)

    def attention(self, model):
        layers = self_attention_layers(model, self.layers, AUTO)
        return (Attention("self", layers, self.edit, ("keys", "values"), (self.source,)),)

    def edit(self, target, beside, attend, call, weight, role):
        (source,) = beside
        with blame(self):
            m = on_tokens(self.region.on(call.run.shape), target, adaptive_max_pool2d)
        kept = (1 - m) * weight
        changed = outside(source, target, kept)
        if self.bonus:
            bias = torch.zeros(len(m), target.k.shape[1], device=target.k.device)
            bias[:, slice(*target.image)] = self.bonus * kept
            changed = biased(changed, bias)
        return attend(changed)


def outside(source, target, kept):
    """The AttnCall `target` with the source's keys and values mixed in by `kept` [b, N], for each image token."""
    changed, (first, last, _) = {}, slice(*target.image).indices(target.k.shape[1])
    for name in ("k", "v"):
        t, s = getattr(target, name), getattr(source, name)[:, slice(*source.image)]
        mixed = torch.lerp(t[:, first:last], s.to(t), kept[..., None].to(t))
        changed[name] = torch.cat((t[:, :first], mixed, t[:, last:]), 1)
    return replace(target, **changed)


@dataclass(frozen=True, eq=False)
class Fresh:
    """Starts the sampler from noise of its own inside the region (`re_init` of the official code), where the noise that
    it was given leads back to the source."""

    region: Region
    seed: int

    def outer_sample(self, executor, noise, latent_image, *args, **kwargs):
        with blame(KVReuse):
            inside = self.region.on(noise.shape) > 0
        generators = (torch.Generator().manual_seed((self.seed + i) % 2**63) for i in range(len(noise)))
        fresh = torch.stack([torch.randn(noise.shape[1:], generator=g) for g in generators])
        return executor(torch.where(inside.to(noise.device), fresh.to(noise), noise), latent_image, *args, **kwargs)


def apply(model, trajectory, mask, bonus, layers, schedule, cells=0, soft=0, re_init=False, seed=0, source=None):
    """A clone of `model` that edits `mask` [b, h, w] alone; outside of it the latent comes out as the source's."""
    from comfy.patcher_extension import WrappersMP

    with blame(KVReuse):
        branch = source_from(model, trajectory, source)
    region = Region(mask, trajectory, cells, soft)
    model = keepregion.carry(model, region)
    tells = f"{digest(mask)} {cells} {soft}"
    model = steer(model, KVReuse(schedule, branch, bonus, layers, tells, region))
    if re_init:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, Fresh(region, seed).outer_sample)
    return model
