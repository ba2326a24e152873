"""Names of layers: "middle", "output.3-5", "double.7-9", "single", "50%", "50%-70%", and lists of these."""

import re
from typing import NamedTuple

PART = re.compile(r"(?P<group>[a-z_]+)(?:\.(?P<first>\d+)(?:-(?P<last>\d+))?)?")
SHARE = re.compile(r"(?P<first>\d+(?:\.\d+)?)%(?:-(?P<last>\d+(?:\.\d+)?)%)?")


class Layer(NamedTuple):
    """One block of the network: `group` is "input", "middle", "output" (UNet), "double" or "single" (DiT)."""

    group: str
    index: int

    def __str__(self):
        return "middle" if self.group == "middle" else f"{self.group}.{self.index}"


def resolve(text, available):
    """The layers that `text` names, as a tuple in the order of `available` (the order of the forward pass).

    A percentage is taken of the whole depth: "50%" is the layer there, "50%-70%" all from there to there.
    Raises ValueError for text that cannot be read or names no layer.
    """
    chosen = set()
    for part in (p.strip() for p in text.split(",")):
        if share := SHARE.fullmatch(part):
            first, last = (float(share[k] or 0) / 100 * len(available) for k in ("first", "last"))
            if not share["last"]:
                first, last = int(first), int(first) + 1
            found = [layer for i, layer in enumerate(available) if first <= i < last]
        elif name := PART.fullmatch(part):
            first = int(name["first"]) if name["first"] else 0
            last = int(name["last"]) if name["last"] else (first if name["first"] else len(available))
            found = [layer for layer in available if layer.group == name["group"] and first <= layer.index <= last]
        else:
            raise ValueError(f'layers "{part}" cannot be read; write for example "middle", "output.3-5" or "50%-70%".')
        if not found:
            raise ValueError(f'no layer "{part}"; this model has {listing(available)}.')
        chosen.update(found)
    return tuple(layer for layer in available if layer in chosen)


def listing(layers):
    """Layers in words, runs joined: "input.4-5, middle, output.3-8"."""
    runs = []
    for layer in layers:
        if runs and runs[-1][-1].group == layer.group and runs[-1][-1].index + 1 == layer.index:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1].index}" for r in runs)
