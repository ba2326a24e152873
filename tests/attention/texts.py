"""Random networks that take the lab's text encoder, and their attention written out as maps."""

from functools import cache

import comfy.samplers
import torch
import toy
import toy_dit
from attention.by_hand import ARGUMENTS, TOKENS
from steer.models.lab.load import TEXT, load_clip
from steer.patches.shared.trajectory import Trajectory, fingerprint
from steer.patches.shared.words import encode

WIDTH = TEXT["hidden_size"]
NAMES = ("context_dim", "context_in_dim", "vec_in_dim", "joint_attention_dim", "cap_feat_dim", "text_dim")
clip = cache(load_clip)


def wide(config):
    """The config of a network that takes this text."""
    config = {**config, **{name: WIDTH for name in NAMES if config.get(name) is not None}}
    if "context_embedder_config" in config:  # of SD3
        embedder = dict(target="torch.nn.Linear", params=dict(in_features=WIDTH, out_features=128))
        config |= dict(adm_in_channels=WIDTH, context_embedder_config=embedder)
    return config


def network(name):
    if name in ("unet", "flux"):
        config, kind = {"unet": (toy.UNET, "eps"), "flux": (toy.FLUX, "flow")}[name]
        base = {"unet": comfy.model_base.BaseModel, "flux": comfy.model_base.Flux}[name]
        return toy.model(wide(config), kind, base=base)
    return toy_dit.model(name, change=wide)


def conditioning(prompt):
    return encode(clip(), prompt)[0]


def noise(name, seed=0, batch=1):
    return toy.noise(seed, batch) if name in ("unet", "flux") else toy_dit.noise(name, batch, seed=seed)


def path(name, model, prompt, batch=1, steps=4):
    sigmas, clean, eps = toy.sigmas(model, steps), 0.3 * noise(name, 40, batch), noise(name, 50, batch)
    latents = torch.stack([clean + s * eps for s in sigmas])
    return Trajectory(sigmas, latents, fingerprint(model), conditioning(prompt))


def one_step(trajectory, level=0):
    """Options for one step to 0 from a level of the trajectory."""
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    sigmas = trajectory.sigmas[[level, -1]]
    return dict(sigmas=sigmas, start=trajectory.latents[level] / sigmas[0], sampler=sampler)


def maps(q, k, heads):
    """softmax(q k^T / sqrt(d)), [b, heads, N, M]."""
    q, k = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def times(a, v):
    """a v, [b, N, C]."""
    return (a @ v.unflatten(2, (a.shape[1], -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def watched(name, model, look):
    """A clone in which the attentions of the blocks are look(kind, number, q, k, v, heads, text) -> output or None:
    text is the number of keys that are text, where text and image share one attention."""
    turn = 0
    before = 4 if name in ("lumina", "z-image") else 0  # of its refiners

    def hook(function, q, k, v, heads, *args, **kwargs):
        nonlocal turn
        kwargs = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        assert kwargs.get("mask") is None
        q, k, v = ((t.transpose(1, 2) if kwargs.get("skip_reshape") else t).flatten(2) for t in (q, k, v))
        number, turn, out, text = turn - before, turn + 1, None, 0
        if number >= 0:
            kind = "self" if q.shape[1] == k.shape[1] else "cross"
            if name not in ("unet", "wan"):
                kind, text = "joint", k.shape[1] - {**TOKENS, "z-image": 32}[name]
            out = look(kind, number, q, k, v, heads, text)
        if out is None:
            out = function(q, k, v, heads, **{**kwargs, "skip_reshape": False, "skip_output_reshape": False})
        return out.unflatten(2, (heads, -1)).transpose(1, 2) if kwargs.get("skip_output_reshape") else out

    made = model.clone()
    made.model_options["transformer_options"]["optimized_attention_override"] = hook
    return made
