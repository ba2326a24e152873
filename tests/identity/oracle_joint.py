"""Files of IP-Adapters for transformers, small and random, with the keys of the public ones, and what they do, written
out on the host's own hooks. The arithmetic is the official code's, read and written down again on bare tensors."""

import math
from contextlib import contextmanager

import torch
from attention.by_hand import attention
from identity import oracle
from identity.oracle import linears, norm, rand
from steer.models.identity.joint import INSTANTX, TIMED, XLABS
from torch.nn.functional import adaptive_avg_pool2d, gelu, layer_norm, linear, silu

WIDTH, HIDDEN, HEADS = 96, 128, 2  # of tokens; of toy_dit's networks
DOUBLES, SINGLES, BLOCKS = 3, 4, 10  # of toy_dit's Flux and SD3
TIME = 32
NETWORKS = {XLABS: "flux", INSTANTX: "flux", TIMED: "sd3"}


def file(variant, seed=0):
    """A flat state dict."""
    if variant == XLABS:
        sd = linears(proj=(4 * WIDTH, oracle.EMBEDDING)) | norm("norm", WIDTH)
        sd = {f"ip_adapter_proj_model.{key}": value for key, value in sd.items()}
        for n in range(DOUBLES):
            for i, x in enumerate("kv"):
                at = f"double_blocks.{n}.processor.ip_adapter_double_stream_{x}_proj"
                sd[f"{at}.weight"] = rand(HIDDEN, WIDTH, seed=1000 * seed + 2 * n + i)
                sd[f"{at}.bias"] = 0.1 * rand(HIDDEN, seed=1000 * seed + 2 * n + i + 500)
        return sd
    if variant == INSTANTX:
        given = oracle.STATES
        image = linears(proj__0=(2 * given, given), proj__2=(8 * WIDTH, 2 * given)) | norm("norm", WIDTH)
        blocks, width = DOUBLES + SINGLES, WIDTH
    else:
        image, blocks, width = oracle.resampler(WIDTH, oracle.STATES, HIDDEN, queries=8), BLOCKS, HIDDEN
        image |= linears(time_embedding__linear_1=(WIDTH, TIME), time_embedding__linear_2=(WIDTH, WIDTH))
        image |= {f"layers.{n}.2.1.{k}": v for n in range(2) for k, v in (
            ("weight", rand(4 * WIDTH, WIDTH, seed=n + 70)), ("bias", 0.1 * rand(4 * WIDTH, seed=n + 80)),
        )}
    sd = {f"image_proj.{key}": value for key, value in image.items()}
    for n in range(blocks):
        for i, x in enumerate("kv"):
            sd[f"ip_adapter.{n}.to_{x}_ip.weight"] = rand(HIDDEN, width, seed=1000 * seed + 2 * n + i)
        if variant == TIMED:
            at = f"ip_adapter.{n}."
            sd[f"{at}norm_ip.linear.weight"] = rand(2 * width, WIDTH, seed=n + 40)
            sd[f"{at}norm_ip.linear.bias"] = 0.1 * rand(2 * width, seed=n + 50)
            for i, name in enumerate(("norm_q", "norm_k", "norm_ip_k")):
                sd[f"{at}{name}.weight"] = 1 + 5 * rand(HIDDEN // HEADS, seed=3 * n + i)
    return sd


def tokens(variant, sd, x, t=None):
    """e [n, T, width], and for SD3.5 the embedding of the time t in 0..1000."""
    below = {k.removeprefix("ip_adapter_proj_model.").removeprefix("image_proj."): v for k, v in sd.items()}
    if variant == XLABS:
        return oracle.tokens("base", below, x)
    if variant == INSTANTX:
        e = linear(gelu(linear(x, below["proj.0.weight"], below["proj.0.bias"])), below["proj.2.weight"],
                   below["proj.2.bias"])
        return layer_norm(e.reshape(len(x), -1, WIDTH), (WIDTH,), below["norm.weight"], below["norm.bias"])
    return _of_time(below, x, t)


def _of_time(sd, x, t):
    def lin(name, y):
        return linear(y, sd[f"{name}.weight"], sd.get(f"{name}.bias"))

    def nrm(name, y):
        return layer_norm(y, y.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])

    waves = [t * math.exp(-math.log(10000) * i / (TIME // 2)) for i in range(TIME // 2)]
    time = torch.tensor([[math.cos(w) for w in waves] + [math.sin(w) for w in waves]])
    time = lin("time_embedding.linear_2", silu(lin("time_embedding.linear_1", time)))
    y, z = lin("proj_in", x) + time, sd["latents"].repeat(len(x), 1, 1)
    for i in range(2):
        shift, scale, shift_2, scale_2 = lin(f"layers.{i}.2.1", silu(time)).chunk(4, 1)
        asking = nrm(f"layers.{i}.0.norm2", z) * (1 + scale) + shift
        both = torch.cat((nrm(f"layers.{i}.0.norm1", y), asking), 1)
        k, v = lin(f"layers.{i}.0.to_kv", both).chunk(2, 2)
        z = z + lin(f"layers.{i}.0.to_out", attention(lin(f"layers.{i}.0.to_q", asking), k, v, k.shape[-1] // 64))
        inner = gelu(lin(f"layers.{i}.1.1", nrm(f"layers.{i}.1.0", z) * (1 + scale_2) + shift_2))
        z = z + lin(f"layers.{i}.1.3", inner)
    return nrm("norm_out", lin("proj_out", z)), time


def rms(x, eps, weight=1.0):
    """By head."""
    x = x.unflatten(-1, (HEADS, -1))
    return (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight).flatten(-2)


def shares(out, options, answer):
    """`out` [B, N, C] and, for the rows of each cond, answer(rows, index of the cond)."""
    indices = options["cond_or_uncond"]
    size = len(out) // len(indices)
    return torch.cat([its + answer(slice(n * size, (n + 1) * size), i) for n, (i, its) in
                      enumerate(zip(indices, out.split(size), strict=True))])


def spread(mask, n, text=0):
    """mask [h, w] of a latent on its tokens, [1, n, 1]: the text has the mean."""
    if mask is None:
        return 1.0
    m = adaptive_avg_pool2d(mask[None], (mask.shape[0] // 2, mask.shape[1] // 2)).flatten(1)
    return torch.cat((m.mean(1, keepdim=True).expand(1, text), m), 1)[..., None]


def flux_by_hand(variant, model, sd, cond, uncond, strength=0.8, mask=None, only=None):
    """A clone of a toy Flux that follows the official code by the host's attn1 patches and block replacements.

    cond, uncond: what the projector takes; uncond None adds nothing there.
    """
    made = model.clone()
    e = [None if x is None else tokens(variant, sd, x).flatten(0, 1)[None] for x in (cond, uncond)]
    asked = {}

    def ask(q, k, v, pe, attn_mask, extra_options):
        asked["q"] = q.transpose(1, 2).flatten(2).clone()
        return {}

    made.set_model_attn1_patch(ask)

    def answered(q, n, i, m):
        if e[i] is None:
            return 0.0
        if variant == XLABS:
            at = f"double_blocks.{n}.processor.ip_adapter_double_stream_"
            k, v = (linear(e[i], sd[f"{at}{x}_proj.weight"], sd[f"{at}{x}_proj.bias"]) for x in "kv")
        else:
            k, v = (rms(e[i] @ sd[f"ip_adapter.{n}.to_{x}_ip.weight"].T, 1e-5) for x in "kv")
        k, v = (t.expand(len(q), -1, -1) for t in (k, v))
        return strength * m * attention(q, k, v, HEADS)

    if variant == XLABS:
        before = made.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})

        def follow(n, previous):
            def replace(args, extra):
                out = (previous or (lambda args, extra: extra["original_block"](args)))(args, extra)
                text, options = out["txt"].shape[1], args["transformer_options"]
                q, m = asked["q"][:, text:], spread(mask, out["img"].shape[1])
                img = shares(out["img"], options, lambda rows, i: answered(q[rows], n, i, m))
                return {**out, "img": img}

            return replace

        for n in range(DOUBLES):
            made.set_model_patch_replace(follow(n, before.get(("double_block", n))), "dit", "double_block", n)
        return made

    def output(out, options):
        single = options["block_type"] == "single"
        n, text = options["block_index"] + DOUBLES * single, options["img_slice"][0]
        if only is not None and n not in only:
            return out
        q, first = asked["q"], 0 if single else text
        m = spread(mask, out.shape[1] - text, text if single else 0)
        added = shares(out[:, first:], options, lambda rows, i: answered(q[rows, first:], n, i, m))
        return torch.cat((out[:, :first], added), 1)

    made.set_model_attn1_output_patch(output)
    return made


@contextmanager
def sd3_by_hand(model, sd, cond, uncond, strength=0.8, mask=None):
    """A clone of a toy SD3 that follows InstantX' code by an attention override; hooks tell it the bare q and k."""
    made, raw, calls, handles = model.clone(), [], 0, []
    blocks = made.model.diffusion_model.joint_blocks
    for block in blocks:
        for norm_of in (block.x_block.attn.ln_q, block.x_block.attn.ln_k):
            handles.append(norm_of.register_forward_pre_hook(lambda m, args: raw.append(args[0].flatten(2).clone())))
    each = 2 if blocks[0].x_block.x_block_self_attn else 1

    def override(function, q, k, v, heads, *args, **kwargs):
        nonlocal calls
        number, calls = calls % (each * len(blocks)), calls + 1
        out = function(q, k, v, heads, *args, **kwargs)
        if number % each:
            return out
        n, options, (raw_q, raw_k) = number // each, kwargs["transformer_options"], raw[-2:]
        image, t = raw_q.shape[1], 1000 * float(options["sigmas"][0])
        at = f"ip_adapter.{n}."

        def answer(rows, i):
            x = (cond, uncond)[i]
            if x is None:
                return 0.0
            e, time = tokens(TIMED, sd, x, t)
            moved = linear(silu(time), sd[f"{at}norm_ip.linear.weight"], sd[f"{at}norm_ip.linear.bias"])
            shift, scale = moved.chunk(2, 1)
            e = layer_norm(e.flatten(0, 1)[None], e.shape[-1:], eps=1e-6) * (1 + scale) + shift
            k_ip, v_ip = (e @ sd[f"{at}to_{x}_ip.weight"].T for x in "kv")
            k_ip = rms(k_ip, 1e-6, sd[f"{at}norm_ip_k.weight"])
            own = rms(raw_k[rows], 1e-6, sd[f"{at}norm_k.weight"])
            size = len(own)
            keys = torch.cat((own, k_ip.expand(size, -1, -1)), 1)
            values = torch.cat((v.flatten(2)[rows, -image:], v_ip.expand(size, -1, -1)), 1)
            its = attention(rms(raw_q[rows], 1e-6, sd[f"{at}norm_q.weight"]), keys, values, HEADS)
            return strength * spread(mask, image) * its

        return torch.cat((out[:, :-image], shares(out[:, -image:], options, answer)), 1)

    made.model_options["transformer_options"]["optimized_attention_override"] = override
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()
