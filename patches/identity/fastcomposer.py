"""FastComposer (Xiao et al. 2023, arXiv 2305.10431): several subjects of a prompt, each with a picture of its own.

Delayed subject conditioning is its equation 6; its localised attention is a loss in training and has no part here.
"""

from ..shared.fused import delayed, embedded, fused
from ..shared.reference import check_node
from ..shared.steering import blame, number
from ..shared.words import encode, listed


class FastComposer:
    node = "SteerFastComposer"


def columns_of(prompt, subjects):
    """The last column of the words of each subject, in order: a name that is there again is the next place of it."""
    taken, columns = {}, []
    for name in listed(subjects):
        key = name.lower()
        places = prompt.places(name)[0]
        nth = taken[key] = taken.get(key, -1) + 1
        if nth >= len(places):
            raise ValueError(f'"{name}" is named {nth + 1} times, and the prompt has it {len(places)} times.')
        columns.append(prompt.streams[0].words[places[nth][-1]][1][-1])
    if len(set(columns)) < len(columns):
        raise ValueError(f'two of the subjects "{subjects}" end in the same word; name each word once.')
    return columns


def tuned(patcher, adapter, prefix, names):
    """A clone of `patcher` (of a MODEL or CLIP) with the file's weights below `prefix` in place of its own.

    names: {name in the file: name in the network}.  ValueError where they do not fit.
    """
    weights = {key.removeprefix(prefix): w for key, w in adapter.weights.items() if key.startswith(prefix)}
    if not weights:
        return patcher
    patcher, have = patcher.clone(), patcher.model_state_dict()
    at = {names[key]: w for key, w in weights.items() if key in names}
    if len(at) < len(weights) or any(key not in have or have[key].shape != w.shape for key, w in at.items()):
        raise ValueError(
            f"{adapter.name} brings weights of {prefix.removesuffix('.')} that this model does not have; use a model "
            "of SD1.5."
        )
    patcher.add_patches({key: ("set", (w,)) for key, w in at.items()})
    return patcher


def whole(model, clip, adapter):
    """(MODEL, CLIP) with the UNet and the text encoder of the file, where it has them."""
    from comfy.utils import unet_to_diffusers

    names = {k: f"diffusion_model.{v}" for k, v in unet_to_diffusers(model.model.model_config.unet_config).items()}
    model = tuned(model, adapter, "unet.", names)
    text = "clip_l.transformer.text_model."
    names = {k.removeprefix(text): k for k in clip.patcher.model_state_dict()}
    clip = clip.clone()
    clip.patcher = tuned(clip.patcher, adapter, "text_encoder.", names)
    return model, clip


def apply(model, clip, adapter, images, text, subjects, merge):
    """(model, clip, CONDITIONING): the file's own networks, and a prompt whose `subjects` look like the images.

    images: [n, h, w, 3], one for each subject.  subjects: words of the prompt with commas between them.
    merge: share of the sampling range that sees the prompt alone.
    """
    with blame(FastComposer):
        check_node(adapter, FastComposer.node)
        number("merge", merge, high=1.0)
        model, clip = whole(model, clip, adapter)
        plain, prompt = encode(clip, text)
        columns = columns_of(prompt, subjects)
        if len(columns) != len(images):
            raise ValueError(f"there are {len(columns)} subjects and {len(images)} pictures; give one for each.")
        both = fused(plain, columns, embedded(adapter, images), adapter)
        return model, clip, delayed(plain, both, merge)
