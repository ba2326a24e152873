"""ELITE (Wei et al. 2023, arXiv 2302.13848): an object of a picture as a word of the prompt, with its details."""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import interpolate

from ..shared.attention import additive
from ..shared.conditioning import digest
from ..shared.reference import Reference, check_node, in_file_order
from ..shared.reference import places as places_of
from ..shared.steering import blame, number, steer
from ..shared.words import encode

DEPTHS = (4, 8, 12, 16)  # layers after which hidden states are taken, behind those of the last


@dataclass(frozen=True)
class ELITE(Reference):
    """o + s M (a / max a) A(q, W_k e, W_v e) in place of o = A(q, K, V), in each head of every cross-attention, where a
    is how much q attends to the word and e are the object's patches.

    column: of the word in the conditioning. The largest a is that of all heads and places of an item.
    """

    column: int = 0
    node = "SteerELITE"

    def edit(self, target, beside, attend, call, weight, role):
        out, projected = attend(target), call.run.state[self]
        with blame(self):
            if target.k.shape[1] <= self.column:
                raise ValueError("another prompt is wired than the node's; take its own positive.")
            asking = replace(target, raw={**target.raw, "word": self.seen(target)})
            return projected.add(out, asking, role, self.strength * weight)

    def seen(self, call):
        """a / max a, [B, N, heads, 1]."""
        q, k = (t.unflatten(2, (call.heads, -1)).transpose(1, 2).float() for t in (call.q, call.k))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if call.mask is not None:
            scores = scores + additive(call.mask, scores.dtype)
        a = scores.softmax(-1)[..., self.column]
        return (a / a.amax((1, 2), keepdim=True)).transpose(1, 2)[..., None]

    def answer(self, call, out):
        seen = super().answer(call, out)
        return (seen.unflatten(2, (call.heads, -1)) * call.raw["word"].to(seen)).flatten(2)


def states_of(clip_vision, images):
    """Hidden states [n, 5, 1 + P, E] that the mappers take of images [n, h, w, 3] in 0..1, squeezed into a square."""
    from comfy.model_management import load_model_gpu

    load_model_gpu(clip_vision.patcher)
    size = clip_vision.image_size
    pixels = images[..., :3].movedim(-1, 1).float().cpu()  # not every device has the bicubic filter
    pixels = interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(t).to(pixels)[:, None, None] for t in (clip_vision.image_mean, clip_vision.image_std))
    pixels = ((pixels - mean) / std).to(clip_vision.load_device)
    with torch.no_grad():
        last, between, *_ = clip_vision.model(pixel_values=pixels, intermediate_output="all")
    if between.shape[1] < DEPTHS[-1]:
        raise ValueError(f"clip_vision has {between.shape[1]} layers; ELITE was trained with CLIP ViT-L/14.")
    return torch.stack([last, *(between[:, n - 1] for n in DEPTHS)], 1).float().cpu()


def column_of(prompt, word):
    """Column of a word that is there once, as one token; ValueError where it is not."""
    places = prompt.places(word)[0]
    columns = [c for place in places for i in place for c in prompt.streams[0].words[i][1]]
    if len(columns) != 1:
        raise ValueError(
            f'"{word}" is {len(columns)} tokens of the prompt; name a word that is there once and short, such as S.'
        )
    return columns[0]


def with_word(clip, text, column, vector):
    """The CONDITIONING of a text whose token at `column` is a vector [width] in place of a word."""
    tokens = clip.tokenize(text)
    for chunks in tokens.values():
        chunk, at = divmod(column, len(chunks[0]))
        chunks[chunk][at] = (vector, *chunks[chunk][at][1:])
    return clip.encode_from_tokens_scheduled(tokens)


def with_attention(model, adapter):
    """A clone of `model` with the global mapper's W_k and W_v in its cross-attentions."""
    network = model.get_model_object("diffusion_model")
    names = {module: name for name, module in network.named_modules()}
    patches = {}
    for (*_, attention), layer in zip(in_file_order(network), adapter.weights, strict=True):
        for x in "kv":
            patches[f"diffusion_model.{names[attention]}.to_{x}.weight"] = "set", (layer[f"to_{x}_ip"],)
    model = model.clone()
    model.add_patches(patches)
    return model


def apply(
    model, clip, adapter, clip_vision, image, text, word, strength, schedule, local=None, object_mask=None, mask=None
):
    """(model, CONDITIONING): the object of a picture [1, h, w, 3] in place of `word`.

    adapter: the global mapper.  local: the local one, for details with `strength` and `schedule`; None for none.
    object_mask: [1, h, w] on the picture, 1 where the object is; None for all of it.
    """
    with blame(ELITE):
        for each in (adapter, *([] if local is None else [local])):
            check_node(each, ELITE.node)
            each.check_encoder(clip_vision.config)
        if "local" in adapter.name.lower() or (local is not None and "global" in local.name.lower()):
            raise ValueError("the mappers are crossed: adapter takes the global one, local the local one.")
        number("strength", strength)
        if len(image) != 1:
            raise ValueError(f"image has {len(image)} pictures; ELITE takes one.")
        weights = tuple((layer, 1.0) for layer, _ in dict.fromkeys(places_of(model, adapter)))
        plain, prompt = encode(clip, text)
        if plain[0][0].shape[-1] != adapter.width:
            raise ValueError(
                f"{adapter.name} is for a text of width {adapter.width}, and this text encoder makes "
                f"{plain[0][0].shape[-1]}; take that of SD1.4 or SD1.5."
            )
        column = column_of(prompt, word)
        positive = with_word(clip, text, column, adapter.project(states_of(clip_vision, image))[0, 0])
        model = with_attention(model, adapter)
        term = ELITE(schedule, local, strength, weights, mask=mask, column=column)
        if local is None or term.off:
            return model, positive
        places_of(model, local)
        tokens = details(local, clip_vision, image, object_mask)
    return steer(model, replace(term, content=digest([tokens, mask]), tokens=tokens)), positive


def details(local, clip_vision, image, object_mask):
    """e of the object in a picture, [1, P, width]; zero at patches that it does not touch."""
    kept = torch.ones(1, *image.shape[1:3]) if object_mask is None else (object_mask > 0).float().cpu()
    if kept.shape != (1, *image.shape[1:3]):
        raise ValueError(f"object_mask is {tuple(kept.shape)}, and image {tuple(image.shape)}; make it of the picture.")
    tokens = local.project(states_of(clip_vision, image.cpu() * kept[..., None]), local=True)
    side = round(tokens.shape[1] ** 0.5)
    small = interpolate(interpolate(kept[None], (8 * side, 8 * side)), (side, side))
    return tokens * small.reshape(1, -1, 1)
