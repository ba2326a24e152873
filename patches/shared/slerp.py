"""Spherical interpolation (Shoemake 1985)."""

import torch


def slerp(a, b, share):
    """(sin((1 - t) w) a + sin(t w) b) / sin w, t the share: from a to b along the arc between them, [B, ...], of any
    norm, w the angle between all of an item. Where a and b are parallel there is no arc: straight between them."""
    u, v = (t.flatten(1).to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
    angle = torch.nn.functional.cosine_similarity(u, v, dim=1, eps=1e-12).clamp(-1, 1).acos()[:, None]
    flat = angle.sin() < 1e-4
    sine = torch.where(flat, 1.0, angle.sin())
    first = torch.where(flat, 1 - share, ((1 - share) * angle).sin() / sine)
    second = torch.where(flat, share, (share * angle).sin() / sine)
    return (first * u + second * v).view_as(a).to(a)
