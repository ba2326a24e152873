"""Steer: controllable generation for ComfyUI. A MODEL carries its steering, and every sampler obeys it."""

WEB_DIRECTORY = "./nodes/help"


async def comfy_entrypoint():
    from .nodes import Steer  # lazily, so that the maths in patches/ imports without ComfyUI

    return Steer()
