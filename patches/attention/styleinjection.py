"""StyleID (Chung et al. 2024, arXiv 2312.09008): the style of one picture in the self-attention of another."""

from dataclasses import dataclass, replace

import torch

from ..inversion.invert import InvertedNoise
from ..shared.architectures import self_attention_layers, unet
from ..shared.attention import Attention, image_from
from ..shared.source import covers, source_from
from ..shared.steering import Source, Term, blame, number, steer

# the last 6 of 16: output.6-11 of Stable Diffusion 1.5, the paper's choice
AUTO = {unet.name: "62.5%-100%"}


def adain(content, style):
    """`content` [B, C, ...] with mean and (unbiased) standard deviation of `style` in each channel of each item."""
    dims = tuple(range(2, content.ndim))

    def moments(x):
        return x.mean(dims, keepdim=True), x.std(dims, keepdim=True)

    (mean, std), (its_mean, its_std) = moments(content), moments(style)
    return (content - mean) / std.clamp(min=1e-8) * its_std + its_mean


@dataclass(frozen=True)
class StyleInjection(Term):
    """Attention(T (g q_c + (1 - g) q), k_s, v_s) over the picture: equations 5 and 6 of the paper.

    q: queries of the target.  q_c: of the content, k_s, v_s: keys and values of the style, both at their own latents of
    the same noise level, beside the target. T multiplies what goes into the softmax. Text keeps its own attention where
    it shares one with the picture.
    """

    content: Source = None
    style: Source = None
    gamma: float = 0.75
    temperature: float = 1.5
    layers: str = "auto"
    node = "SteerStyleInjection"
    edits = True

    def check(self):
        number("gamma", self.gamma, 0.0, 1.0)
        number("temperature", self.temperature, 0.0, 100.0)

    def prepare(self, run):
        for source in (self.content, self.style):
            covers(source, run)

    def branches(self, model):
        return (self.content, self.style)

    def attention(self, model):
        layers = self_attention_layers(model, self.layers, AUTO)
        sources = (self.content, self.style)
        return (Attention("self", layers, self.inject, ("queries", "keys", "values"), sources),)

    def inject(self, target, beside, attend, call, weight, role):
        content, style = beside
        changed = image_from(style, image_from(content, target, "q", self.gamma), "kv")
        image = slice(*target.image)
        q = changed.q.clone()
        q[:, image] *= self.temperature
        return attend(replace(changed, q=q))


def start(content, style):
    """The content's trajectory with its first latent in the colours of the style's: where the paper starts."""
    first = adain(content.latents[0], style.latents[0])
    return replace(content, latents=torch.cat((first[None], content.latents[1:])))


def apply(model, content, style, gamma, temperature, layers, schedule, source=None):
    """The steered model and the NOISE with which the target starts."""
    with blame(StyleInjection):
        sources = [source_from(model, trajectory, source) for trajectory in (content, style)]
        (mine, its), batch = (t.latents.shape[1:] for t in (content, style)), content.latents.shape[1]
        if mine[1:] != its[1:] or its[0] not in (1, batch):
            raise ValueError(
                f"content and style differ in size or batch: {tuple(mine)} and {tuple(its)} (batch, channels, height, "
                "width); bring the style to the size of the content before it is inverted."
            )
        if abs(float(content.sigmas[0] - style.sigmas[0])) > 1e-4 * float(content.sigmas[0]):
            raise ValueError(
                f"content and style were inverted to other noise levels, {float(content.sigmas[0]):.4g} and "
                f"{float(style.sigmas[0]):.4g}; invert both with the same steps and scheduler."
            )
    steered = steer(model, StyleInjection(schedule, *sources, gamma, temperature, layers))
    return steered, InvertedNoise(start(content, style), model)
