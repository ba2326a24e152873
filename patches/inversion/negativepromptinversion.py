"""Negative-prompt inversion (Miyake et al. 2023, arXiv 2305.16807): the source's prompt in place of the negative."""

from ..shared.slerp import slerp
from ..shared.steering import number

NODE = "SteerNegativePromptInversion"


def apply(source, negative=None, interpolation=0.0):
    """The CONDITIONING for the sampler's negative: `source`, or on the way from it to `negative`.

    With it as negative and `source` as positive, D_neg + cfg (D_pos - D_neg) = D_pos at any cfg: the path of the
    inversion, which ran without guidance.
    """
    number(f"{NODE}: interpolation", interpolation, 0.0, 1.0)
    if not source:
        raise ValueError(f"{NODE}: the source prompt is empty; wire the one with which the picture was inverted.")
    if interpolation == 0.0:
        return source
    if not negative:
        raise ValueError(f"{NODE}: interpolation {interpolation} is towards a negative, and there is none; wire it.")
    if len(source) > 1 or len(negative) > 1:
        raise ValueError(
            f"{NODE}: the source prompt has {len(source)} parts and the negative {len(negative)}; interpolation is "
            "between one each. Set it to 0, or take prompts that are not combined."
        )
    ((a, options),), ((b, others),) = source, negative
    if a.shape != b.shape:
        raise ValueError(
            f"{NODE}: the source prompt has {a.shape[1]} tokens of width {a.shape[2]}, the negative {b.shape[1]} of "
            f"width {b.shape[2]}; set interpolation to 0, or take prompts of equal length from one text encoder."
        )
    options = dict(options)
    p, q = options.get("pooled_output"), others.get("pooled_output")
    if p is not None and q is not None:
        options["pooled_output"] = slerp(p, q, interpolation)
    return [[slerp(a, b.to(a), interpolation), options]]
