"""What the reader says about images, as rows for programs and as text for people."""

import functools

import torch

from .captions import parse
from .reader import load_reader

_reader = functools.cache(load_reader)


def rows(images, reference=None, prompt=""):
    """images, reference [B, H, W, 3] in [0, 1] -> one dict per image, ready for JSON."""
    reader, x, said = _reader(), _to_reader(images), parse(prompt)
    if prompt.strip() and not said:
        raise ValueError(
            f"SteerLabRead: prompt={prompt!r} names no factor of the lab's world. Write it like Lab Portrait's "
            "captions, or leave it empty."
        )
    out = []
    for row in reader.read(x):
        out.append({"factors": {name: dict(value=v, probability=round(p, 4)) for name, (v, p) in row.items()}})
    with torch.no_grad():
        if said:
            for row, score in zip(out, reader.score(x, prompt).tolist(), strict=True):
                row |= {"prompt": said, "score": round(score, 4)}
        if reference is not None:
            if len(reference) not in (1, len(images)):
                raise ValueError(
                    f"SteerLabRead: reference holds {len(reference)} images for {len(images)} images. Give one "
                    "reference, or one per image."
                )
            for row, same in zip(out, (reader(x)[2] * reader(_to_reader(reference))[2]).sum(1).tolist(), strict=True):
                row["identity"] = round(same, 4)
    return out


def _to_reader(images):
    with torch.inference_mode(False):
        return images[..., :3].movedim(-1, 1).float().cpu().clone()


def text(row):
    """One row as lines: factor, value, probability, and what the prompt wanted instead."""
    lines = []
    for name, read in row["factors"].items():
        wanted = row.get("prompt", {}).get(name, read["value"])
        note = f"   (prompt: {wanted})" if wanted != read["value"] else ""
        lines.append(f"{name.replace('_', ' '):11} {read['value']:10} {read['probability']:.2f}{note}")
    if "score" in row:
        lines.append(f"fit to the prompt: {row['score']:.3f} (0 is perfect)")
    if "identity" in row:
        lines.append(f"identity similarity to the reference: {row['identity']:.3f}")
    return "\n".join(lines)
