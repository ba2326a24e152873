"""PhotoMaker (Li et al. 2023, arXiv 2312.04461): pictures of a person in place of a word of the prompt."""

from ..shared.face import face_of
from ..shared.fused import delayed, embedded, fused, marked
from ..shared.reference import check_node
from ..shared.steering import blame, number

CARRIED = "steer_photomaker"  # attachment of a model: digests of the files whose LoRA it has


class PhotoMaker:
    node = "SteerPhotoMaker"


def with_lora(model, adapter, strength):
    """A clone of `model` that carries the file's LoRA; where it does already, by another of these nodes, as it is.

    ValueError where it does not fit.
    """
    import comfy.lora
    from comfy.utils import unet_to_diffusers

    carried = model.get_attachment(CARRIED) or ()
    if not adapter.weights or strength == 0.0 or adapter.digest in carried:
        return model
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    for name, key in unet_to_diffusers(model.model.model_config.unet_config).items():
        names[f"unet.{name.removesuffix('.weight')}"] = f"diffusion_model.{key}"  # as newer diffusers writes it
    patches = comfy.lora.load_lora(dict(adapter.weights), names, log_missing=False)
    pairs = sum(key.endswith(("down.weight", "lora_A.weight")) for key in adapter.weights)
    model = model.clone()
    model.set_attachments(CARRIED, (*carried, adapter.digest))
    taken = len(model.add_patches(patches, strength))
    if taken < pairs:
        raise ValueError(
            f"the LoRA of {adapter.name} is for {pairs} weights, of which this model has {taken}; use a model of SDXL, "
            "or lora_strength 0."
        )
    return model


def apply(model, clip, adapter, images, text, trigger, merge, lora_strength, face=None):
    """(model with the file's LoRA, CONDITIONING) of a prompt with `trigger` after the word for the person.

    images: [n, h, w, 3], of one person.  face: for version 2, a `Face` or embeddings [n, 512], one for each image.
    merge: share of the sampling range that sees the prompt without the pictures.
    """
    with blame(PhotoMaker):
        check_node(adapter, PhotoMaker.node)
        number("merge", merge, high=1.0)
        number("lora_strength", lora_strength)
        trigger = trigger.strip()
        alone, _ = marked(clip, text, trigger, 1)
        tokens, columns = marked(clip, text, trigger, len(images) * adapter.tokens)
        plain = clip.encode_from_tokens_scheduled(alone) if merge > 0.0 else []
        if merge < 1.0:
            ids = embedded(adapter, images, None if face is None else face_of(face))
            both = fused(clip.encode_from_tokens_scheduled(tokens), columns, ids, adapter)
        else:
            both = []
        return with_lora(model, adapter, lora_strength), delayed(plain, both, merge)
