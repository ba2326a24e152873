"""The extension: every `NODES` list found in the rooms of this package."""

import importlib
import pkgutil

from comfy_api.latest import ComfyExtension


def discover():
    """All node classes, room by room in alphabetical order."""
    nodes = []
    for room in sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg):
        package = importlib.import_module(f".{room}", __name__)
        for method in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            nodes += getattr(importlib.import_module(f".{room}.{method}", __name__), "NODES", [])
    return nodes


class Steer(ComfyExtension):
    async def get_node_list(self):
        return discover()
