"""PuLID's files, small and random, with the keys of the public ones, and what they do, written out on bare tensors and
the host's own hooks. The arithmetic is the official code's (Apache-2.0), read and written down again."""

import torch
from attention.by_hand import attention
from identity.oracle import HIDDEN, TEXT, linears, norm, rand, resampler
from torch.nn.functional import adaptive_avg_pool2d, gelu, layer_norm, leaky_relu, linear, normalize

V1, V1_1, FLUX = "PuLID v1", "PuLID v1.1", "PuLID Flux"
EVA, STATES, PATCHES, DIM = 24, 128, 9, 64  # widths of EVA-CLIP's embedding and states; of the IDFormer
FLUX_TOKEN, CROSS = 72, 256  # width of Flux' identity tokens; inner width of its cross-attention: two heads
WIDTH = 128  # of toy_dit's Flux
FOLLOWED = [("double", 0), ("double", 2), ("single", 0)]  # of its 3 double and 4 single blocks


def mlp(prefix, given, out, seed):
    sd = {}
    for n, (a, b) in {0: (given, 32), 3: (32, 32), 6: (32, out)}.items():
        sd[f"{prefix}.{n}.weight"] = rand(b, a, seed=seed + n)
        sd[f"{prefix}.{n}.bias"] = 0.1 * rand(b, seed=seed + n + 9)
        if n:
            sd |= norm(f"{prefix}.{n - 2}", 32, seed + n)
    return sd


def file(variant, form="official", seed=0):
    """A flat state dict. form: "official", or "converted" as other packs have v1."""
    given = 512 + EVA
    if variant == V1:
        image = mlp("body", given, 5 * TEXT, seed)
        for i in range(5):
            image |= mlp(f"mapping_{i}", STATES, TEXT, 20 * i) | mlp(f"mapping_patch_{i}", STATES, TEXT, 20 * i + 100)
    else:
        width = FLUX_TOKEN if variant == FLUX else TEXT
        layers = resampler(DIM, DIM, DIM, depth=10)
        image = {key: value for key, value in layers.items() if key.startswith("layers.")}
        image |= {"latents": rand(1, 8, DIM, seed=3), "proj_out": rand(DIM, width, seed=4 + seed)}
        image |= mlp("id_embedding_mapping", given, 5 * DIM, seed)
        for i in range(5):
            image |= mlp(f"mapping_{i}", STATES, DIM, 20 * i)
    if variant == FLUX:
        sd = {f"pulid_encoder.{key}": value for key, value in image.items()}
        for n in range(len(FOLLOWED)):
            its = norm("norm1", FLUX_TOKEN, n) | norm("norm2", WIDTH, n + 5) | linears(
                to_q_=(CROSS, WIDTH), to_kv_=(2 * CROSS, FLUX_TOKEN), to_out_=(WIDTH, CROSS)
            )
            sd |= {f"pulid_ca.{n}.{key}": value * (1 + n) for key, value in its.items()}
        return sd
    first, second, names = ("id_adapter", "id_adapter_attn_layers", "id_to_{}") if form == "official" else (
        "image_proj", "ip_adapter", "to_{}_ip"
    )
    sd = {f"{first}.{key}": value for key, value in image.items()}
    for n, width in enumerate(HIDDEN):
        for i, x in enumerate("kv"):
            weight = rand(width, TEXT, seed=1000 * seed + 2 * n + i)
            sd[f"{second}.{2 * n + 1}.{names.format(x)}.weight"] = weight
    return sd


def person(n=1, seed=0):
    """(face embeddings [n, 512], EVA-CLIP's (embedding [n, E], five hidden states))."""
    states = [rand(n, 1 + PATCHES, STATES, seed=50 * seed + i) for i in range(5)]
    return 20 * rand(n, 512, seed=seed + 60), (3 * rand(n, EVA, seed=seed + 70), states)


def _mlp(sd, name, x):
    for n in (0, 3):
        x = linear(x, sd[f"{name}.{n}.weight"], sd[f"{name}.{n}.bias"])
        x = leaky_relu(layer_norm(x, x.shape[-1:], sd[f"{name}.{n + 1}.weight"], sd[f"{name}.{n + 1}.bias"]), 0.01)
    return linear(x, sd[f"{name}.6.weight"], sd[f"{name}.6.bias"])


def _norm(sd, name, x):
    return layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])


def tokens(variant, sd, person, mix=False):
    """[1, T, width]; person None is nobody."""
    prefix = {V1: "id_adapter.", V1_1: "id_adapter.", FLUX: "pulid_encoder."}[variant]
    sd = {key.removeprefix(prefix): value for key, value in sd.items()}
    if person is None:
        who, states = torch.zeros(1, 512 + EVA), [torch.zeros(1, 1 + PATCHES, STATES)] * 5
    else:
        face, (seen, states) = person
        who = torch.cat((face, seen / seen.norm(dim=1, keepdim=True)), 1)
        assert torch.allclose(normalize(seen), who[:, 512:])
    if variant == V1:
        found = []
        for n in range(len(who)):
            its = [_mlp(sd, "body", who[n : n + 1]).reshape(1, 5, TEXT)]
            for i, y in enumerate(states):
                patches = _mlp(sd, f"mapping_patch_{i}", y[n : n + 1, 1:]).mean(1, keepdim=True)
                its.append(_mlp(sd, f"mapping_{i}", y[n : n + 1, :1]) + patches)
            its = torch.cat(its, 1)
            found.append(its if mix or not n else its[:, :5])
        return torch.cat(found, 1)
    x = _mlp(sd, "id_embedding_mapping", who[None]).reshape(1, -1, DIM)
    z = torch.cat((sd["latents"], x), 1)
    for i in range(5):
        y = torch.cat([_mlp(sd, f"mapping_{i}", its[None]) for its in states[i]], 1)
        for n in (2 * i, 2 * i + 1):
            at = {key.removeprefix(f"layers.{n}."): value for key, value in sd.items()}
            asking = _norm(at, "0.norm2", z)
            both = torch.cat((_norm(at, "0.norm1", torch.cat((x, y), 1)), asking), 1)
            k, v = (both @ at["0.to_kv.weight"].T).chunk(2, 2)
            z = z + attention(asking @ at["0.to_q.weight"].T, k, v, k.shape[-1] // 64) @ at["0.to_out.weight"].T
            z = z + gelu(_norm(at, "1.0", z) @ at["1.1.weight"].T) @ at["1.3.weight"].T
    return z[:, :8] @ sd["proj_out"]


def sdxl_by_hand(model, sd, cond, uncond, order, method, zeros, strength=0.8, mask=None):
    """A clone of a toy UNet with the official attention as its attn2. cond, uncond: tokens [1, T, width]."""
    made = model.clone()
    e = [x if x is None else torch.cat((x, torch.zeros(1, zeros, TEXT)), 1) for x in (cond, uncond)]

    def replacement(n, previous):
        def replace(q, k, v, extra):
            heads, indices = extra["n_heads"], extra["cond_or_uncond"]
            out = attention(q, k, v, heads) if previous is None else previous(q, k, v, extra)
            parts = []
            for i, h, asking in zip(indices, out.chunk(len(indices)), q.chunk(len(indices)), strict=True):
                if e[i] is not None:
                    k_id, v_id = (
                        (e[i] @ sd[f"id_adapter_attn_layers.{2 * n + 1}.id_to_{x}.weight"].T).expand(len(h), -1, -1)
                        for x in "kv"
                    )
                    its = attention(asking, k_id, v_id, heads)
                    projection = (h * its).sum(-2, keepdim=True) / (h * h).sum(-2, keepdim=True) * h
                    if method == "style":
                        its = its - projection
                    if method == "fidelity":
                        a, b = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (asking, k_id))
                        mean = (a @ b.mT).softmax(-1).mean(1)[:, :, :5].sum(-1, keepdim=True)
                        its = its + (mean - 1) * projection
                    m = 1.0
                    if mask is not None:
                        m = adaptive_avg_pool2d(mask[None], extra["activations_shape"][-2:]).flatten(1)[..., None]
                    h = h + strength * m * its
                parts.append(h)
            return torch.cat(parts)

        return replace

    before = made.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for n, block in enumerate(order):
        made.set_model_attn2_replace(replacement(n, before.get(block)), *block)
    return made


def flux_by_hand(model, sd, cond, uncond, strength=0.8, mask=None):
    """A clone of a toy Flux in whose block replacements the official loop stands."""
    made = model.clone()
    before = made.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})

    def follow(n, previous):
        at = {key.removeprefix(f"pulid_ca.{n}."): v for key, v in sd.items() if key.startswith(f"pulid_ca.{n}.")}

        def answer(x, e):
            k, v = (_norm(at, "norm1", e) @ at["to_kv.weight"].T).chunk(2, 2)
            k, v = (t.expand(len(x), -1, -1) for t in (k, v))
            return attention(_norm(at, "norm2", x) @ at["to_q.weight"].T, k, v, 2) @ at["to_out.weight"].T

        def replace(args, extra):
            out = (previous or (lambda args, extra: extra["original_block"](args)))(args, extra)
            options = args["transformer_options"]
            first = 0 if "txt" in out else options["img_slice"][0]
            indices, img = options["cond_or_uncond"], out["img"].clone()
            size = len(img) // len(indices)
            for place, i in enumerate(indices):
                rows, e = slice(place * size, (place + 1) * size), (cond, uncond)[i]
                if e is not None:
                    x, m = img[rows, first:], 1.0
                    if mask is not None:
                        grid = mask.shape[0] // 2, mask.shape[1] // 2
                        m = adaptive_avg_pool2d(mask[None], grid).flatten(1)[..., None]
                    img[rows, first:] = x + strength * m * answer(x, e)
            return {**out, "img": img}

        return replace

    for n, (group, index) in enumerate(FOLLOWED):
        key = f"{group}_block", index
        made.set_model_patch_replace(follow(n, before.get(key)), "dit", *key)
    return made
