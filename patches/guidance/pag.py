"""Perturbed-Attention Guidance (Ahn et al. 2024, arXiv 2403.17377)."""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..shared.architectures import flux, hunyuan, lumina, qwen, sd3, self_attention_layers, unet, wan
from ..shared.attention import additive
from ..shared.steering import Away, Weak, steer

AUTO = {
    unet.name: "middle",  # the paper's choice for Stable Diffusion
    sd3.name: "55%",  # double.13 of 24 (huggingface/diffusers #8861, which compares layers)
    # No published comparison. Half depth, where PAG is put in SD3, in PixArt-Sigma (14 of 28, huggingface/diffusers
    # #8921) and in HunyuanDiT (16-19 of 40).
    flux.name: "50%",
    lumina.name: "50%",
    qwen.name: "50%",
    wan.name: "50%",
    hunyuan.name: "50%",
}


def identity_attention(call):
    """Self-attention with the identity as its map, softmax(QK^T) -> I: the output is V.

    Where text and image share one sequence, the identity is the part of the map from image to image: an image token
    sees itself and what is not image, within one softmax (huggingface/diffusers, PAG for Stable Diffusion 3).
    """
    return call.v if call.kind == "self" else joint_identity(call)


def joint_identity(call):
    """Attention under the mask that hides image tokens from each other, without that mask: [B, N, heads * d]."""
    n = call.q.shape[1]
    first, last, _ = slice(*call.image).indices(n)
    image = slice(first, last)

    def rest(t, dim=-2):
        return torch.cat((t.narrow(dim, 0, first), t.narrow(dim, last, n - last)), dim)

    q, k, v = (t.unflatten(2, (call.heads, -1)).transpose(1, 2) for t in (call.q, call.k, call.v))
    mask = None if call.mask is None else additive(call.mask, q.dtype)
    mask = None if mask is None else mask.expand(*mask.shape[:2], n, n)
    around = scaled_dot_product_attention(rest(q), k, v, None if mask is None else rest(mask))
    q, among = q[:, :, image] * q.shape[-1] ** -0.5, torch.empty_like(q[:, :, image])
    for h in range(call.heads):  # one at a time: [B, image, text] scores, not heads times as many
        own = (q[:, h] * k[:, h, image]).sum(-1, keepdim=True)
        scores = torch.cat((q[:, h] @ rest(k[:, h]).mT, own), -1)
        if mask is not None:
            m = mask[:, min(h, mask.shape[1] - 1)]
            scores = scores + torch.cat((rest(m[:, image], -1), m.diagonal(dim1=1, dim2=2)[:, image, None]), -1)
        a = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        among[:, h] = a[..., :-1] @ rest(v[:, h]) + a[..., -1:] * v[:, h, image]
    out = torch.cat((around[:, :, :first], among, around[:, :, first:]), 2)
    return out.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class PAG(Away):
    """D + s (D_c - D_c^), where D_c^ has identity self-attention in `layers`; the paper's guidance, in D."""

    layers: str = "auto"
    node = "SteerPAG"

    def branches(self, model):
        return (Weak("PAG", identity_attention, self_attention_layers(model, self.layers, AUTO)),)


def apply(model, s, layers, schedule):
    return steer(model, PAG(schedule, s, layers))
