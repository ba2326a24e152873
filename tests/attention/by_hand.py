"""What attention methods are measured against: two runs of the host's own, in which attention is written out."""

import comfy.samplers
import torch
import toy
import toy_dit
from steer.patches.shared.trajectory import Trajectory, fingerprint

ARGUMENTS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of the host's attention, after heads
LIKE_FLUX = ("sd3", "qwen", "lumina", "wan")  # toys of toy_dit.py with image tokens at the end
TOKENS = {"unet": None, "flux": 64, "sd3": 16, "qwen": 16, "lumina": 16, "wan": 48}  # of the image in joint attention


def network(name):
    return {"unet": toy.model, "flux": toy.flux}.get(name, lambda: toy_dit.model(name))()


def text(name, seed):
    return toy_dit.text(seed) if name in LIKE_FLUX else toy.text(seed)


def noise(name, seed=0, batch=1):
    return toy_dit.noise(name, batch, seed=seed) if name in LIKE_FLUX else toy.noise(seed, batch)


def path(name, model, batch=1, steps=4, conditioning=None):
    """Any path will do."""
    sigmas, clean, eps = toy.sigmas(model, steps), 0.3 * noise(name, 40, batch), noise(name, 50, batch)
    latents = torch.stack([clean + s * eps for s in sigmas])
    origin = text(name, 5) if conditioning is None else conditioning
    return Trajectory(sigmas, latents, fingerprint(model), origin)


def one_step(name, trajectory, positive=1):
    """Options for one step to 0 from where the trajectory begins."""
    sampler = comfy.samplers.ksampler("euler")
    sampler.max_denoise = lambda *_: False
    sigmas = trajectory.sigmas[[0, -1]]
    return dict(
        sigmas=sigmas, start=trajectory.latents[0] / sigmas[0], sampler=sampler, positive=text(name, positive),
        negative=text(name, 2),
    )


def attention(q, k, v, heads, allowed=True, bias=0.0):
    """softmax(q k^T / sqrt(d) + bias) v [B, N, C], over the keys that are `allowed`: [N, M] or less."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    allowed = torch.as_tensor(allowed).expand(scores.shape[-2:])
    a = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (a @ v).transpose(1, 2).flatten(2)


def drawn(name, model, trajectory, edit, layers=None, **options):
    """One step of the target in which the output of its self or joint attentions is edit(target, source, image, heads),
    with (q, k, v) [B, N, C] of both and the slice that holds the image; source from a run of its own.

    layers: numbers of these attentions in the order of the forward; all by default.
    """
    before = toy_dit.TOYS[name].before if name in LIKE_FLUX else 0
    kept, turn, sampling_source = [], 0, True

    def hook(function, q, k, v, heads, *args, **kwargs):
        nonlocal turn
        kwargs = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        q, k, v = ((t.transpose(1, 2) if kwargs.get("skip_reshape") else t).flatten(2) for t in (q, k, v))
        own = {**kwargs, "skip_reshape": False, "skip_output_reshape": False}
        out = None
        if q.shape[1] == k.shape[1]:
            number, turn = turn - before, turn + 1
            if number >= 0 and sampling_source:
                kept.append((q.clone(), k.clone(), v.clone()))
            elif number >= 0 and (layers is None or number in layers):
                image = slice(None) if TOKENS[name] is None else slice(q.shape[1] - TOKENS[name], None)
                assert kwargs.get("mask") is None
                out = edit((q, k, v), kept[number], image, heads)
        out = function(q, k, v, heads, **own) if out is None else out
        return out.unflatten(2, (heads, -1)).transpose(1, 2) if kwargs.get("skip_output_reshape") else out

    hooked = model.clone()
    hooked.model_options["transformer_options"]["optimized_attention_override"] = hook
    given = one_step(name, trajectory)
    toy.sample(hooked, **{**given, "positive": trajectory.conditioning})
    turn, sampling_source = 0, False
    return toy.sample(hooked, **{**given, **options})


def image_of(source, target, image):
    """`target` with the image tokens of `source`."""
    out = target.clone()
    out[:, image] = source[:, image]
    return out


def near(a, b, tolerance=2e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance
