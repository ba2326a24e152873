"""The README's table of editing methods and architectures, found out by running each on small networks of each.

    python tests/editing_table.py

rewrites the table. A method has a line in METHODS; a network has an entry in tests/toy_dit.py.
"""

import sys
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import architectures_table  # noqa: E402
import host  # noqa: E402

BEGIN = "<!-- written by python tests/editing_table.py -->\n"
SOURCE, PROMPT = "a person, blue hair", "a person, red hair"
FILLER = ", very" * 240  # more than the 512 columns to which the host fills the text of some networks up


class Network:
    """A small network, the path of a picture, and what is drawn with it."""

    def __init__(self, name, make, filler):
        self.name, self.make, self.filler = name, make, filler

    @cached_property
    def model(self):
        return self.make()

    @cached_property
    def noise(self):
        from attention.texts import noise

        return noise(self.name)

    @cached_property
    def path(self):
        from attention.texts import path

        return path(self.name, self.model, SOURCE + self.filler, steps=1)

    def text(self, prompt):
        from attention.texts import conditioning

        return conditioning(prompt + self.filler)

    def drawn(self, model, positive=None):
        import toy

        texts = dict(positive=positive or self.text(PROMPT), negative=self.text(""))
        return toy.sample(model, 3.0, sigmas=self.path.sigmas, start=self.noise, **texts)

    def edited(self, model):
        """By FlowEdit."""
        import toy
        from steer.patches.inversion.flowedit import FlowEdit, guider

        pair = guider(model, *map(self.text, (SOURCE, PROMPT, "")), 1.5, 3.0)
        options = dict(start=self.noise * 0, latent=self.path.source, sigmas=self.path.sigmas)
        return toy.sample(model, None, FlowEdit(), guider=pair, **options)

    @cached_property
    def plain(self):
        return self.drawn(self.model)


def networks():
    """{architecture: {name: Network}}"""
    import toy
    import toy_dit
    from attention.texts import network
    from steer.patches.shared.architectures import ADAPTERS

    names = {adapter.__name__.split(".")[-1]: adapter.name for adapter in ADAPTERS}
    found = {name: {} for name in names.values()}
    found[names["unet"]]["unet"] = Network("unet", partial(network, "unet"), "")
    for name, about in toy_dit.TOYS.items():
        found[names[about.adapter]][name] = Network(name, partial(network, name), FILLER if about.least else "")
    return {**found, "any other": {"other": Network("unet", toy.gaussian, "")}}


def always():
    from steer.patches.shared.schedule import Schedule

    return Schedule()


def prompttoprompt(m, n):
    from attention.texts import clip

    made, positive, _ = m.apply(n.model, clip(), n.path, SOURCE + n.filler, PROMPT + n.filler)
    return n.drawn(made, positive), n.plain


def wordmask(m, n):
    from attention.texts import clip

    seen, _ = m.look(n.model, clip(), PROMPT + n.filler, "hair", trajectory=n.path)
    return seen.amax(), seen.amin()


def kvreuse(m, n):
    """Beside what keeps the region alone."""
    import torch

    keepregion = import_module("steer.patches.inversion.keepregion")
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 2:6] = 1.0
    made = m.apply(n.model, n.path, mask, 0.0, "auto", always())
    return n.drawn(made), n.drawn(keepregion.apply(n.model, mask, n.path, 0, 0, always()))


def fluxspace(m, n):
    edit, null = n.text("eyeglasses"), n.text("")
    columns = edit[0][0].new_ones(1, edit[0][0].shape[1])
    return n.drawn(m.apply(n.model, edit, null, columns, 5.0, 0.0, 0.0, "auto", always())), n.plain


def found(m, n):
    from steer.patches.inversion.invert import InvertedNoise

    noise = InvertedNoise(n.path, n.model)
    return m.of_prompts(n.model, n.text(PROMPT), n.text(SOURCE), noise, {"samples": n.noise * 0}, n.path.sigmas, 1.0)


def asyrp(m, n):
    direction = found(import_module("steer.patches.hspace.direction"), n)
    return n.drawn(m.apply(n.model, direction, 5.0, always())), n.plain


def pullback(m, n):
    moved, _ = m.edit(n.model, n.path.conditioning, n.path, 0.5, 1, 1.0, 1, 4)
    return moved, m.edit(n.model, n.path.conditioning, n.path, 0.5, 1, 0.0, 1, 4)[0]


# file of the method -> (room, (its module, Network) -> what comes out with it, what comes out without)
METHODS = {
    "prompttoprompt": ("attention", prompttoprompt),
    "wordmask": ("attention", wordmask),
    "masactrl": ("attention", lambda m, n: (n.drawn(m.apply(n.model, n.path, 1.0, "auto", always())), n.plain)),
    "kvreuse": ("attention", kvreuse),
    "plugandplay": (
        "attention", lambda m, n: (n.drawn(m.apply(n.model, n.path, "auto", always(), "auto", always())), n.plain)
    ),
    "freecontrol": (
        "attention",
        lambda m, n: (n.drawn(m.apply(n.model, n.path, 1.0, 4, "auto", m.METHODS[0], always())), n.plain),
    ),
    "unifiedattention": (
        "attention", lambda m, n: (n.edited(m.apply(n.model, 0.5, 0.0, 0.0, "auto", always())), n.edited(n.model))
    ),
    "fluxspace": ("attention", fluxspace),
    "styleinjection": (
        "attention",
        lambda m, n: (n.drawn(m.apply(n.model, n.path, n.path, 0.75, 1.5, "auto", always())[0]), n.plain),
    ),
    "injectfusion": ("hspace", lambda m, n: (n.drawn(m.apply(n.model, n.path, 0.5, always())), n.plain)),
    "direction": ("hspace", lambda m, n: (found(m, n), None)),
    "asyrp": ("hspace", asyrp),
    "pullback": ("hspace", pullback),
    "directinversion": ("inversion", lambda m, n: (n.drawn(m.apply(n.model, n.path, 1.0, always())), n.plain)),
    "flowedit": ("inversion", lambda m, n: (n.edited(n.model), n.path.source)),
}


def acts(method, network):
    """True where the method changes the result, False where it refuses the model."""
    import torch

    room, run = METHODS[method]
    try:
        out, plain = run(import_module(f"steer.patches.{room}.{method}"), network)
    except ValueError as error:
        if not str(error).startswith("Steer"):
            raise
        return False
    if plain is not None and torch.equal(out, plain):
        raise AssertionError(f"{method} does nothing on {network.name}, and does not say so")
    return True


def answers(named):
    """{method: cell} of one architecture, {name: Network}."""
    return {method: architectures_table.cell({name: acts(method, n) for name, n in named.items()})
            for method in METHODS}


def main():
    host.enter()
    host.load_pack()
    found = {architecture: answers(named) for architecture, named in networks().items()}
    architectures_table.write(BEGIN, architectures_table.table(found))
    print(architectures_table.written(BEGIN))


if __name__ == "__main__":
    main()
