"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): a picture as a prompt, beside the text."""

from dataclasses import dataclass, replace

import torch

from ...models.identity.jointadapter import JointAdapter
from ..shared.architectures import self_attention_layers, unet
from ..shared.conditioning import digest
from ..shared.jointreference import JointReference, beside, blocks_of
from ..shared.layers import listing, resolve
from ..shared.reference import Reference, check_node, places
from ..shared.steering import blame, steer

ALL = {unet.name: "input, middle, output"}
COMBINE = ("concat", "average", "add", "subtract", "one each")
UNCONDITIONAL = ("as trained", "black picture", "none")

# weight of layer number t of L, in the order of the forward
RAMPS = {
    "linear": lambda t, L: 1.0,
    "ease in": lambda t, L: 0.05 + 0.95 * (1 - t / L),
    "ease out": lambda t, L: 0.05 + 0.95 * (t / L),
    "ease in-out": lambda t, L: 0.05 + 0.95 * (1 - abs(t - L / 2) / (L / 2)),
    "reverse in-out": lambda t, L: 0.05 + 0.95 * (abs(t - L / 2) / (L / 2)),
}
# weight of the layers of a group, 1 elsewhere
GROUPS = {
    "weak input": {"input": 0.2},
    "weak middle": {"middle": 0.2},
    "weak output": {"output": 0.2},
    "strong middle": {"input": 0.2, "output": 0.2},
}
# {number of layers: {number of the layer: weight}}, 0 elsewhere. SDXL's are InstantStyle's (Wang et al. 2024, arXiv
# 2404.02733: up_blocks.0.attentions.1 and down_blocks.2.attentions.1), those of SD1.x are common practice
SDXL, SD1 = 11, 16
COMPOSITION = {SDXL: {3: 1.0}, SD1: {4: 0.25, 5: 1.0}}
STYLE = {SDXL: {6: 1.0}, SD1: dict.fromkeys((*range(4), *range(9, 16)), 1.0)}
CHOSEN = {
    "style": STYLE,
    "composition": COMPOSITION,
    "style and composition": {n: STYLE[n] | COMPOSITION[n] for n in (SDXL, SD1)},
    "all but composition": {n: {t: 1.0 for t in range(n) if t not in COMPOSITION[n]} for n in (SDXL, SD1)},
}
WEIGHTS = (*RAMPS, *GROUPS, *CHOSEN)


@dataclass(frozen=True)
class IPAdapter(Reference):
    node = "SteerIPAdapter"


@dataclass(frozen=True)
class JointIPAdapter(JointReference):
    node = "SteerIPAdapter"


def weights_of(model, adapter, weight_type, layers):
    """((Layer, weight), ...) of a preset, for the named layers of a ModelPatcher."""
    if isinstance(adapter, JointAdapter):
        have = blocks_of(model, adapter)
        if weight_type not in RAMPS:
            raise ValueError(f'weight_type "{weight_type}" is known for UNets; choose one of {", ".join(RAMPS)}.')
        chosen = have if layers.strip() == "auto" else resolve(layers, have)
        return tuple((layer, RAMPS[weight_type](t, len(have))) for t, layer in enumerate(have) if layer in chosen)
    places(model, adapter)
    chosen = self_attention_layers(model, layers, ALL)
    network = model.get_model_object("diffusion_model")
    have = tuple(dict.fromkeys(layer for layer, *_ in unet.cross_attentions(network)))
    L = len(have)
    if weight_type in CHOSEN:
        if L not in CHOSEN[weight_type]:
            raise ValueError(
                f'weight_type "{weight_type}" is known for SD1.x and SDXL, and this model has {L} layers with '
                f"cross-attention; name those you want: {listing(have)}."
            )
        found = [CHOSEN[weight_type][L].get(t, 0.0) for t in range(L)]
    elif weight_type in GROUPS:
        found = [GROUPS[weight_type].get(layer.group, 1.0) for layer in have]
    else:
        found = [RAMPS[weight_type](t, L) for t in range(L)]
    return tuple((layer, w) for layer, w in zip(have, found, strict=True) if layer in chosen)


def encoded(adapter, clip_vision, images, crop=True, head=None):
    """What the adapter takes of images [n, h, w, 3], from a CLIP_VISION: [n, E] or [n, P, E]."""
    return taken(adapter, clip_vision.encode_image(images, crop=crop), head)


def taken(adapter, output, head=None):
    """The same of a CLIP_VISION_OUTPUT; ValueError where another encoder made it. head: what pools its last states."""
    embeds = output.image_embeds if adapter.pooled else output.penultimate_hidden_states
    embeds = embeds if head is None else head(output.last_hidden_state)
    if embeds.shape[-1] != adapter.image:
        raise ValueError(
            f"{adapter.name} needs {adapter.encoder}; the embeds that are wired have width {embeds.shape[-1]}."
        )
    return embeds


def of_nothing(clip_vision):
    """Hidden states of the grey picture whose pixels are 0 once they are normalised: [1, P, E]."""
    from comfy.model_management import load_model_gpu

    load_model_gpu(clip_vision.patcher)
    size = clip_vision.image_size
    pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    with torch.no_grad():
        return clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1].cpu()


def combined(embeds, how):
    """What several pictures make together, [n, ...] -> [k, ...], before it is projected."""
    if how == "average":
        return embeds.mean(0, keepdim=True)
    if how == "add":
        return embeds.sum(0, keepdim=True)
    if how == "subtract" and len(embeds) > 1:
        return embeds[:1] - embeds[1:].mean(0, keepdim=True)
    return embeds


def tokens_of(adapter, seen, how, **options):
    """Tokens [1, n * T, width] of the pictures side by side, or [n, T, width] with one each. seen: what the projector
    takes of them."""
    tokens = adapter.project(*(combined(each, how) for each in seen), **options)
    return tokens if how == "one each" else tokens.flatten(0, 1)[None]


def unconditional_of(adapter, embeds, clip_vision, how, head=None):
    """Tokens for the negative, [1, T, width], or None. "as trained": what `Adapter.blank` says."""
    if how == "none":
        return None
    if how == "as trained" and adapter.blank == "zero":
        return adapter.project(torch.zeros_like(embeds[:1]))
    if clip_vision is None:
        raise ValueError(
            f'unconditional "{how}" of {adapter.name} is what the image encoder makes of a blank picture; wire '
            'clip_vision too, or choose "none".'
        )
    if how == "as trained" and adapter.blank == "grey":
        return adapter.project(of_nothing(clip_vision))
    size = clip_vision.image_size
    return adapter.project(encoded(adapter, clip_vision, torch.zeros(1, size, size, 3), head=head))


def apply(model, adapter, strength, weight_type, layers, combine, unconditional, schedule, image=None, clip_vision=None,
          embeds=None, negative_image=None, mask=None, crop=True, head=None):
    """A clone of `model` that is prompted by pictures: IMAGE [n, h, w, 3] with CLIP_VISION, or a CLIP_VISION_OUTPUT.

    head: of the encoder, for adapters that take SigLIP's pooled picture: last states -> [n, E].
    """
    with blame(IPAdapter):
        check_node(adapter, IPAdapter.node)
        if (image is None) == (embeds is None):
            raise ValueError("needs one of image and embeds; wire the picture, or what CLIP Vision Encode made of it.")
        if clip_vision is None and not (image is None and negative_image is None):
            raise ValueError(f"needs clip_vision to look at a picture; {adapter.name} needs {adapter.encoder}.")
        if clip_vision is not None:
            adapter.check_encoder(clip_vision.config)
        weights = weights_of(model, adapter, weight_type, layers)
        joint = isinstance(adapter, JointAdapter)
        term = (JointIPAdapter if joint else IPAdapter)(schedule, adapter, strength, weights, mask=mask)
        if term.off:
            return steer(model, term)
        if not (joint and adapter.headed) or (clip_vision is not None and "projection_dim" in clip_vision.config):
            head = None  # an encoder with a projection, as CLIP has, pools by itself
        elif head is None:
            raise ValueError(
                f"{adapter.name} takes what SigLIP's pooling head makes of the picture, and the host leaves it out: "
                "wire clip_vision, loaded from a safetensors file in models/clip_vision that holds the head too "
                "(vision_model.head), as siglip-so400m-patch14-384 does."
            )
        seen = taken(adapter, embeds, head) if image is None else encoded(adapter, clip_vision, image, crop, head)
        tokens = tokens_of(adapter, [seen], combine)
        if negative_image is not None:
            blank = tokens_of(adapter, [encoded(adapter, clip_vision, negative_image, crop, head)], "concat")
        else:
            blank = unconditional_of(adapter, seen, clip_vision, unconditional, head)
    content = digest([tokens, blank, mask])
    term = replace(term, content=content, tokens=tokens, unconditional=blank)
    if joint and adapter.timed:
        model, term = beside(model, adapter), replace(term, patches=seen.shape[1])
    return steer(model, term)
