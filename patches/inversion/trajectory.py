"""A trajectory as a file: safetensors, with numbers and words as JSON in its metadata."""

import json
import os
from pathlib import Path

import torch

from ..shared.trajectory import Fingerprint, Trajectory
from .invert import InvertedNoise

SUFFIX = ".trajectory.safetensors"
FORMAT, VERSION = "steer.trajectory", 1
PLAIN = (str, int, float, bool, type(None))


def save(trajectory, path):
    """Writes a `Trajectory`; ValueError where its conditioning holds what is neither tensor, number nor word."""
    from safetensors.torch import save_file

    tensors, foreign = {}, []
    conditioning = _pack(trajectory.conditioning, "conditioning", tensors, foreign)
    if foreign:
        raise ValueError(
            f"SteerSaveTrajectory: its conditioning holds what no file can ({', '.join(foreign)}); invert with a "
            "prompt that has no such node on it."
        )
    model = trajectory.model
    told = {
        "method": trajectory.method,
        "model": {"network": model.network, "latent": model.latent, "prediction": model.prediction},
        "conditioning": conditioning,
    }
    tensors |= {"sigmas": trajectory.sigmas, "latents": trajectory.latents, "weights": model.weights}
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    part = Path(f"{path}.part")  # nobody finds half a file
    save_file(tensors, part, {"format": FORMAT, "version": str(VERSION), "trajectory": json.dumps(told)})
    os.replace(part, path)


def load(path):
    """The `Trajectory` of a file; ValueError where it is none, not whole, or newer than this code."""
    from safetensors import SafetensorError, safe_open

    name = f"SteerLoadTrajectory: {Path(path).name}"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # of their own memory: what is mapped dies with the file
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be read as a whole safetensors file ({error}); save it anew.") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{name} is not a trajectory; choose a file that SteerSaveTrajectory wrote.")
    version = metadata.get("version", "")
    if version != str(VERSION):
        raise ValueError(
            f"{name} has format version {version!r}, and this code reads {VERSION}; update Steer, or save the "
            "trajectory with this version."
        )
    try:
        told = json.loads(metadata["trajectory"])
        model = Fingerprint(weights=tensors["weights"], **told["model"])
        conditioning = _unpack(told["conditioning"], tensors)
        return Trajectory(tensors["sigmas"], tensors["latents"], model, conditioning, told["method"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is damaged ({type(error).__name__}: {error}); save it anew.") from None


def _pack(value, where, tensors, foreign):
    """`value` as JSON: tensors go to `tensors` under `where`, names of what cannot be saved to `foreign`."""
    if isinstance(value, torch.Tensor):
        tensors[where] = value
        return {"tensor": where}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        items = [_pack(v, f"{where}.{i}", tensors, foreign) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _pack(v, f"{where}.{key}", tensors, foreign) for key, v in value.items()}}
    foreign.append(f"{where.rsplit('.', 1)[-1]}: {type(value).__name__}")
    return None


def _unpack(value, tensors):
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(v, tensors) for v in content)
    return {key: _unpack(v, tensors) for key, v in content.items()}


def parts(model, trajectory):
    """What a sampler needs to go on from a trajectory on this ModelPatcher: (source latent [B, C, ...], NOISE, sigmas,
    CONDITIONING). ValueError where it is another model's."""
    try:
        trajectory.check(model)
    except ValueError as error:
        raise ValueError(f"SteerTrajectoryParts: {error}") from None
    source = model.model.process_latent_out(trajectory.source)
    return source, InvertedNoise(trajectory, model), trajectory.sigmas, trajectory.conditioning
