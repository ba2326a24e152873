"""ELITE's mappers, small and random, with the keys of the public files, and what they do, written out on bare tensors
and the host's own hooks after the official code."""

import torch
from identity import oracle_fuse
from identity.oracle import norm, rand
from torch.nn.functional import adaptive_avg_pool2d, interpolate, layer_norm, leaky_relu, linear

STATES, INNER = 128, 48  # widths of the test's image encoder, and of the mappers


def mapper(width, seed=0):
    sd = {}
    for i in range(5):
        for name in (f"mapping_{i}", f"mapping_patch_{i}"):
            for n, (a, b) in {0: (STATES, INNER), 3: (INNER, INNER), 6: (INNER, width)}.items():
                sd[f"{name}.{n}.weight"] = rand(b, a, seed=seed + 9 * i + n + len(name))
                sd[f"{name}.{n}.bias"] = 0.1 * rand(b, seed=seed + i + n)
                if n:
                    sd |= norm(f"{name}.{n - 2}", INNER, seed + i + n)
    for n, (block, out) in enumerate(oracle_fuse.BLOCKS):
        for i, x in enumerate("kv"):
            key = f"{block}.transformer_blocks.0.attn2".replace(".", "_")
            sd[f"{key}_to_{x}.weight"] = rand(out, width, seed=seed + 100 + 2 * n + i)
    return sd


def _mlp(sd, name, x):
    for n in (0, 3):
        x = linear(x, sd[f"{name}.{n}.weight"], sd[f"{name}.{n}.bias"])
        x = leaky_relu(layer_norm(x, x.shape[-1:], sd[f"{name}.{n + 1}.weight"], sd[f"{name}.{n + 1}.bias"]))
    return linear(x, sd[f"{name}.6.weight"], sd[f"{name}.6.bias"])


def seen(clip_vision, image):
    """Hidden states that the official code takes of [1, s, s, 3], layer by layer."""
    vision = clip_vision.model.vision_model
    pixels = ((image - oracle_fuse.MEAN) / oracle_fuse.STD).movedim(-1, 1)
    with torch.no_grad():
        x, found = vision.pre_layrnorm(vision.embeddings(pixels)), []
        for layer in vision.encoder.layers:
            x = layer(x, None, _attention)
            found.append(x.clone())
    return [found[-1], found[3], found[7], found[11], found[15]]


def _attention(q, k, v, heads, mask=None, **_):
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def word(sd, states):
    """w_0 [width]: of the last states."""
    x = states[0]
    return (_mlp(sd, "mapping_0", x[:, :1]) + _mlp(sd, "mapping_patch_0", x[:, 1:]).mean(1, keepdim=True))[0, 0]


def details(sd, states, mask):
    """[1, P, width] of the states of the object on black; mask: [h, w]."""
    tokens = 0
    for i, x in enumerate(states):
        tokens = tokens + (_mlp(sd, f"mapping_{i}", x[:, :1]) + _mlp(sd, f"mapping_patch_{i}", x[:, 1:])) / 5
    side = int(tokens.shape[1] ** 0.5)
    small = interpolate(interpolate(mask[None, None], (8 * side, 8 * side)), (side, side))
    return tokens * small.reshape(1, -1, 1)


def by_hand(model, sd, local, e, column, order, strength=0.8, mask=None):
    """A clone of a toy UNet with the official cross-attention. local, e: the local mapper and its tokens, or None."""
    made = model.clone()

    def replacement(n):
        name = f"{oracle_fuse.BLOCKS[n][0]}.transformer_blocks.0.attn2".replace(".", "_")

        def change(x, context, value, extra):
            """What the host multiplies W_k and W_v with; ours are applied in `replace`."""
            seen_by[n] = context
            return x, context, value

        def replace(q, k, v, extra):
            heads, size = extra["n_heads"], extra["activations_shape"][-2:]
            k, v = (seen_by[n] @ sd[f"{name}_to_{x}.weight"].T.to(k) for x in "kv")
            q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            probs = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            out, rows = probs @ v, len(q) // len(extra["cond_or_uncond"])
            for place, i in enumerate(extra["cond_or_uncond"]):
                for row in range(place * rows, (place + 1) * rows) if e is not None and not i else ():
                    k_l, v_l = (e[0] @ local[f"{name}_to_{x}.weight"].T for x in "kv")
                    k_l, v_l = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (k_l, v_l))
                    its = (q[row] @ k_l.mT / q.shape[-1] ** 0.5).softmax(-1)
                    a = probs[row, :, :, column]
                    m = 1.0 if mask is None else adaptive_avg_pool2d(mask[None], size).flatten()[None, :, None]
                    out[row] += m * ((its * (a / a.max())[..., None] * strength) @ v_l)
            return out.transpose(1, 2).flatten(2)

        return change, replace

    seen_by, pairs = {}, [replacement(n) for n in range(len(order))]

    def patch(x, context, value, extra):
        return pairs[order.index(extra["block"][:2])][0](x, context, value, extra)

    made.set_model_attn2_patch(patch)
    for (_, replace), block in zip(pairs, order, strict=True):
        made.set_model_attn2_replace(replace, *block)
    return made
