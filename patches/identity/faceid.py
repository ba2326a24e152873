"""IP-Adapter FaceID, FaceID plus and portrait (Ye et al. 2023, arXiv 2308.06721, and its repository): a face as a
prompt."""

from dataclasses import dataclass, replace

import torch

from ..shared.conditioning import digest
from ..shared.face import face_of
from ..shared.reference import Reference, check_node, in_file_order
from ..shared.steering import STACK, blame, number, steer
from .ipadapter import encoded, of_nothing, tokens_of, weights_of

CROP = 224  # side of the aligned face that the image encoder sees


@dataclass(frozen=True)
class FaceID(Reference):
    lora_strength: float = 1.0  # that the model carries of the file's LoRA
    node = "SteerFaceID"


def lora_of(model, adapter):
    """(state dict, {name in it: weight of the network}) of the file's LoRA as the host's loader takes it."""
    network = model.get_model_object("diffusion_model")
    names = {module: name for name, module in network.named_modules()}
    found, at = {}, {}
    cross = [names[attention] for *_, attention in in_file_order(network)]
    for n, pairs in adapter.lora.items():
        attention = cross[n // 2] if n % 2 else cross[n // 2].removesuffix("attn2") + "attn1"
        for key, (down, up) in pairs.items():
            name = f"{attention}.{'to_out.0' if key == 'to_out' else key}"
            at[name] = f"diffusion_model.{name}.weight"
            found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down, up
    return found, at


def with_lora(model, adapter, strength):
    """A clone of `model` that carries the file's LoRA; where it does already, by another of these nodes, as it is."""
    import comfy.lora

    terms = (term for term in model.model_options.get(STACK, ()) if isinstance(term, FaceID))
    carried = any(term.adapter == adapter and term.lora_strength for term in terms)
    if not adapter.lora or strength == 0.0 or carried:
        return model
    patches = comfy.lora.load_lora(*lora_of(model, adapter))
    model = model.clone()
    missed = set(patches) - set(model.add_patches(patches, strength))
    if missed:
        raise ValueError(f"the LoRA of {adapter.name} has weights that this model has not: {sorted(missed)[0]}, ...")
    return model


def seen_of(adapter, face, clip_vision, crop=None):
    """What the projector takes of a `Face`: [embedding] or [embedding, hidden states of its aligned crop]."""
    if face.embedding.shape[-1] != adapter.face:
        raise ValueError(
            f"{adapter.name} takes face embeddings of width {adapter.face}, and this one has "
            f"{face.embedding.shape[-1]}; take the recogniser it was trained with (insightface)."
        )
    who = face.embedding.float() if adapter.variant == "face-resampler" else face.identity
    if not adapter.image:
        return [who]
    if clip_vision is None:
        raise ValueError(f"{adapter.name} looks at the face too: wire clip_vision. It needs {adapter.encoder}.")
    crop = face.crop(CROP) if crop is None else crop
    if len(crop) != len(who):
        raise ValueError(f"there are {len(who)} faces and {len(crop)} crops of them; give one crop for each.")
    return [who, encoded(adapter, clip_vision, crop)]


def apply(
    model, adapter, face, strength, weight_type, layers, combine, unconditional, structure, lora_strength, schedule,
    clip_vision=None, crop=None, mask=None,
):
    """A clone of `model` that is prompted by a face: a `Face`, or an embedding [n, E] as a tensor.

    structure: share of what the crop tells beside the embedding, in FaceID-plus v2.
    crop: the aligned faces [n, h, w, 3], where the `Face` comes without its picture.
    """
    with blame(FaceID):
        check_node(adapter, FaceID.node)
        for name, value in (("structure", structure), ("lora_strength", lora_strength)):
            number(name, value)
        face = face_of(face)
        if clip_vision is not None and adapter.image:
            adapter.check_encoder(clip_vision.config)
        weights = weights_of(model, adapter, weight_type, layers)
        term = FaceID(schedule, adapter, strength, weights, mask=mask, lora_strength=lora_strength)
        if term.off:
            return steer(model, term)
        seen = seen_of(adapter, face, clip_vision, crop)
        options = {"structure": structure} if adapter.variant == "faceid-plus v2" else {}
        tokens, blank = tokens_of(adapter, seen, combine, **options), None
        if unconditional != "none":
            nothing = [torch.zeros_like(seen[0][:1]), *([of_nothing(clip_vision)] if adapter.image else [])]
            blank = adapter.project(*nothing, **options)
        model = with_lora(model, adapter, lora_strength)
    content = digest([tokens, blank, mask])
    return steer(model, replace(term, content=content, tokens=tokens, unconditional=blank))
