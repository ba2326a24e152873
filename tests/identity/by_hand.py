"""Adapters written out: the host's own hooks on a toy UNet, and small random files and encoders for them."""

import torch
import toy
from attention.by_hand import attention
from identity import oracle
from steer.models.identity import adapter as files
from steer.models.lab.load import vision_model
from torch.nn.functional import adaptive_avg_pool2d

ORDER = [("input", 1), ("input", 3), *(("output", i) for i in range(4)), ("middle", 0)]  # of a file for toy.UNET
CONFIG = dict(
    model_type="clip_vision_model", hidden_size=oracle.STATES, projection_dim=oracle.EMBEDDING, image_size=28,
    patch_size=14, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, hidden_act="gelu", num_channels=3,
)
TAKEN = {"base": "image_embeds", "plus": "penultimate_hidden_states", "full-face": "penultimate_hidden_states"}


def encoder(**changes):
    """The host's image encoder, small and random."""
    made = vision_model({**CONFIG, **changes})
    toy.random_weights(made.model, 5)
    return made


def pictures(n=1, seed=0):
    return torch.rand(n, 40, 40, 3, generator=torch.Generator().manual_seed(seed))


def load(variant="plus", seed=0, dtype=torch.float32):
    tree = oracle.file(variant, seed=seed)
    sd = {key: value.to(dtype) for key, value in oracle.flat(tree).items()}
    return tree, files.from_state_dict(sd, f"{variant}-{seed}.safetensors")


def seen(variant, image):
    """What the projector takes of pictures."""
    return encoder().encode_image(image)[TAKEN[variant]]


def blank(variant):
    """The official unconditional: a zero embedding, or the hidden states of zero pixels."""
    if variant == "base":
        return torch.zeros(1, oracle.EMBEDDING)
    return encoder().model(pixel_values=torch.zeros(1, 3, 28, 28), intermediate_output=-2)[1].detach()


def by_hand(model, tree, cond, uncond, strength=0.8, mask=None, only=None, order=ORDER):
    """A clone that adds strength * A(q, W_k e, W_v e) in its cross-attentions by the host's attn2 replacements.

    cond, uncond: e, [1 or B, T, width]; uncond None adds nothing there.  mask: [h, w] on the latent.
    """
    hooked = model.clone()

    def replacement(n, previous):
        def replace(q, k, v, extra):
            heads, indices = extra["n_heads"], extra["cond_or_uncond"]
            out = attention(q, k, v, heads) if previous is None else previous(q, k, v, extra)
            parts = []
            for i, its, queries in zip(indices, out.chunk(len(indices)), q.chunk(len(indices)), strict=True):
                e = uncond if i else cond
                if e is not None:
                    e = e.expand(len(queries), -1, -1).to(queries)
                    k_ip, v_ip = (e @ tree["ip_adapter"][f"{2 * n + 1}.to_{x}_ip.weight"].T.to(e) for x in "kv")
                    share = strength
                    if mask is not None:
                        size = extra["activations_shape"][-2:]
                        share = share * adaptive_avg_pool2d(mask[None], size).flatten(1)[..., None]
                    its = its + share * attention(queries, k_ip, v_ip, heads)
                parts.append(its)
            return torch.cat(parts)

        return replace

    before = hooked.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for n, block in enumerate(order):
        if only is None or block in only:
            hooked.set_model_attn2_replace(replacement(n, before.get(block)), *block)
    return hooked


def e_of(variant, tree, image=None):
    x = blank(variant) if image is None else seen(variant, image)
    return oracle.tokens(variant, tree["image_proj"], x)
