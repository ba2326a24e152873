"""PuLID (Guo et al. 2024, arXiv 2404.16022): a person's identity beside the text, on SDXL and on Flux."""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize

from ..shared.architectures import flux
from ..shared.attention import plain
from ..shared.conditioning import digest
from ..shared.face import align, face_of
from ..shared.jointreference import beside
from ..shared.layers import Layer
from ..shared.reference import Reference, check_node
from ..shared.reference import places as places_of
from ..shared.steering import Weak, blame, number, steer

DEPTHS, DOUBLE, SINGLE = 5, 2, 4  # hidden states taken; a Flux block in so many is followed
OWN = 5  # first tokens: who it is
# tokens of zeros beside those of the person, as in the official demos
METHODS = {"fidelity": {"PuLID v1": 8, "PuLID v1.1": 20}, "style": {"PuLID v1": 16, "PuLID v1.1": 20}, "neutral": {}}
COMBINE = ("one person", "mix")
# eyes, nose and corners of the mouth (x, y) of the aligned face of SIDE x SIDE that PuLID was trained with (facexlib)
TEMPLATE, SIDE = (
    ((192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043),
     (313.08905, 371.15118)), 512,
)
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class PuLID(Reference):
    """o + s M x in place of o = A(q, K, V) in every cross-attention of SDXL, with i = A(q, W_k e, W_v e) and its part
    along o, summed over the picture for each channel, p = <o, i> / <o, o> o:

        neutral    x = i
        style      x = i - p
        fidelity   x = i + (a - 1) p, a: share of softmax(q k^T) that goes to the first five tokens, mean of the heads
    """

    method: str = "fidelity"
    node = "SteerPuLID"

    def answer(self, call, out):
        i = plain(call)
        if self.method == "neutral":
            return i
        x, o = i.float(), out.float()
        p = (o * x).sum(1, keepdim=True) / (o * o).sum(1, keepdim=True) * o
        if self.method == "style":
            return (x - p).to(i)
        q, k = (t.unflatten(2, (call.heads, -1)).transpose(1, 2) for t in (call.q, call.k))
        a = (q @ k.mT).softmax(-1).mean(1)[..., :OWN].sum(-1, keepdim=True)  # not divided by sqrt(d), as published
        return (x + (a.float() - 1) * p).to(i)


@dataclass(frozen=True)
class PuLIDFlux(Reference):
    """x + s M C_n(x, e) in place of the image tokens x that every second double and fourth single block leaves."""

    node = "SteerPuLID"

    def places(self, model):
        return [(layer, 0) for layer in followed(model, self.adapter)]

    def attention(self, model):
        self.places(model)
        return ()

    def after(self, model):
        return tuple((layer, self.follow) for layer, _ in self.weights)

    def follow(self, hidden, target, call, weight, role):
        if self.unconditional is None and role != "positive" and not isinstance(role, Weak):
            return hidden
        with blame(self):
            return call.run.state[self].add(hidden, target, role, self.strength * weight)

    def answer(self, call, out):
        n = next(n for n, (layer, _) in enumerate(self.weights) if layer == call.layer)
        return self.adapter.patcher.model.layers[n](call.q, call.k, call.v)


def followed(model, adapter):
    """Layers of a Flux ModelPatcher that PuLID follows; ValueError where the adapter is made for another network."""
    network, name = model.get_model_object("diffusion_model"), type(model.model).__name__
    if not flux.matches(network):
        raise ValueError(f"{adapter.name} is made for Flux, and this model is {name}.")
    counts = ("double", len(network.double_blocks), DOUBLE), ("single", len(network.single_blocks), SINGLE)
    found = tuple(Layer(group, i) for group, count, step in counts for i in range(0, count, step))
    if (network.hidden_size,) * len(found) != adapter.hidden:
        raise ValueError(
            f"{adapter.name} follows {len(adapter.hidden)} blocks of width {adapter.hidden[0]}, and of this model "
            f"({name}) it would be {len(found)} of width {network.hidden_size}. Take the adapter that is made for it."
        )
    return found


def shown(face, crop=None, face_mask=None):
    """What EVA-CLIP is shown of a `Face`: aligned, grey, white around it; [n, h, w, 3] in 0..1.

    crop: aligned faces [n, h, w, 3], in place of those cut out of the face's picture.
    face_mask: [1 or n, h, w] on that picture (on the crop, where there is one): 1 where the face is; None for all of
        the aligned square.
    """
    picture = face.image if crop is None else crop
    if picture is None:
        raise ValueError("the face comes without its picture; wire crop, the aligned face.")
    grey = picture[..., :3].float().cpu() @ torch.tensor(GREY)
    ink = grey - 1
    if face_mask is not None:
        if face_mask.shape[1:] != grey.shape[1:] or len(face_mask) not in (1, len(grey)):
            its = "the picture of the face" if crop is None else "crop"
            raise ValueError(
                f"face_mask is {tuple(face_mask.shape)}, and {its} {tuple(grey.shape)}; make it of the same picture."
            )
        ink = ink * face_mask.float().cpu()
    ink = ink[..., None]
    if crop is None:
        ink = align(ink, face.keypoints, SIDE, torch.tensor(TEMPLATE))
    return (1 + ink).expand(-1, -1, -1, 3)


def seen_of(adapter, face, eva_clip, crop=None, face_mask=None):
    """(who [n, 512 + E], states [n, 5, P, C]) of a `Face`. eva_clip: an `EVAClip`, or what one saw of it: (embedding
    [n, E], five hidden states [n, P, C]). crop, face_mask: as in `shown`."""
    embedding = face.embedding.float().cpu()
    features = eva_clip.see(shown(face, crop, face_mask)) if hasattr(eva_clip, "see") else eva_clip
    try:
        seen, states = features
        states = torch.stack(tuple(states), 1).float().cpu()
        seen = seen.float().cpu()
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise ValueError(
            f"eva_clip is {type(eva_clip).__name__}; wire SteerLoadEVACLIP, or a pair of what it saw: its embedding "
            "[n, 768] and five hidden states [n, 577, 1024], before its blocks 4, 8, 12, 16 and 20."
        ) from None
    want = (adapter.face, adapter.eva, DEPTHS, adapter.image)
    have = (embedding.shape[-1], seen.shape[-1], states.shape[1], states.shape[-1])
    if want != have:
        raise ValueError(
            f"{adapter.name} takes a face embedding of width {want[0]} and EVA-CLIP's of width {want[1]} with "
            f"{want[2]} hidden states of width {want[3]}; these have {', '.join(map(str, have))}."
        )
    if not len(embedding) == len(seen) == len(states):
        raise ValueError(f"there are {len(embedding)} faces and EVA-CLIP's features of {len(states)}; wire the same.")
    return torch.cat((embedding, normalize(seen, dim=-1)), 1), states


def tokens_of(adapter, who, states, combine):
    """Tokens [1, T, width] of n pictures. Where each has tokens of its own, those after the first give only who it is,
    if they are of one person."""
    tokens = adapter.project(who, states)
    if not adapter.apart:
        return tokens
    rest = tokens[1:] if combine == "mix" else tokens[1:, :OWN]
    return torch.cat((tokens[:1], rest.flatten(0, 1)[None]), 1)


def zeros_of(adapter, method, zeros):
    """Tokens of zeros; -1 stands for what is published."""
    return METHODS[method].get(adapter.variant, 0) if zeros < 0 else zeros


def apply(
    model, adapter, face, eva_clip, strength, method, zeros, combine, unconditional, schedule, crop=None,
    face_mask=None, mask=None,
):
    """A clone of `model` with a person's identity: a `Face`, or an embedding [n, 512].

    eva_clip, crop, face_mask: as in `seen_of`.  method, zeros: of SDXL.
    unconditional: "as trained" shows the negative nobody, "none" leaves it alone.
    """
    with blame(PuLID):
        check_node(adapter, PuLID.node)
        number("zeros", zeros, -1)
        if adapter.flux:
            weights = tuple((layer, 1.0) for layer in followed(model, adapter))
            term = PuLIDFlux(schedule, adapter, strength, weights, mask=mask)
        else:
            weights = tuple((layer, 1.0) for layer, _ in dict.fromkeys(places_of(model, adapter)))
            term = PuLID(schedule, adapter, strength, weights, mask=mask, method=method)
        if term.off:
            return steer(model, term)
        who, states = seen_of(adapter, face_of(face), eva_clip, crop, face_mask)
        tokens, blank = tokens_of(adapter, who, states, combine), None
        if unconditional != "none":
            n = len(who) if adapter.apart else 1
            blank = tokens_of(adapter, torch.zeros_like(who[:n]), torch.zeros_like(states[:n]), combine)
        if not adapter.flux:
            count = zeros_of(adapter, method, zeros)
            tokens, blank = (
                e if e is None else torch.cat((e, e.new_zeros(1, count, e.shape[-1])), 1) for e in (tokens, blank)
            )
    term = replace(term, content=digest([tokens, blank, mask]), tokens=tokens, unconditional=blank)
    return steer(beside(model, adapter) if adapter.flux else model, term)
