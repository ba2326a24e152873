"""The README's table of guidance methods and architectures, found out by running each method on small networks of each.

    python tests/architectures_table.py

rewrites the table. A method has a line in METHODS; a network has an entry in tests/toy_dit.py.
"""

import sys
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import host  # noqa: E402

README = host.ROOT / "README.md"
BEGIN, END = "<!-- written by python tests/architectures_table.py -->\n", "<!-- end of it -->"
# file of the method -> its arguments, of a conditioning and another model where it takes them
# (InstructPix2Pix depends on the conditioning, not on the network)
METHODS = {
    "pag": lambda text, other: (3.0, "auto"),
    "seg": lambda text, other: (3.0, 100.0, "auto"),
    "slg": lambda text, other: (3.0, "auto"),
    "sag": lambda text, other: (0.5, 2.0),
    "adaptiveguidance": lambda text, other: (-1.0,),
    "apg": lambda text, other: (0.0, 15.0, -0.5),
    "autoguidance": lambda text, other: (other, 1.0),
    "betacfg": lambda text, other: (2.0, 2.0, 1.0, False),
    "cfgpp": lambda text, other: (0.6,),
    "cfgzerostar": lambda text, other: (0.5,),
    "fdg": lambda text, other: (5.0, 10.0, 1),
    "feedbackcfg": lambda text, other: (1.0, 12.0, 23, 1.0),
    "guidanceschedule": lambda text, other: (1.0, 9.0, "custom"),
    "negative": lambda text, other: (text, 3.0),
    "rescale": lambda text, other: (0.7,),
    "tag": lambda text, other: (0.3,),
    "tcfg": lambda text, other: (1.0,),
}


class Network:
    """A small model, another one like it, and how they are sampled."""

    def __init__(self, make, text, sample):
        self.make, self.text, self.sample = make, text, sample

    @cached_property
    def model(self):
        return self.make(0)

    @cached_property
    def other(self):
        return self.make(5)

    @cached_property
    def plain(self):
        return self.sample(self.model, steps=2)


def networks():
    """{architecture: {name: Network}}"""
    import torch
    import toy
    import toy_dit
    from steer.patches.shared.architectures import ADAPTERS

    def unknown(seed):
        model = toy.gaussian()
        model.model.diffusion_model.std += seed
        return model

    names = {adapter.__name__.split(".")[-1]: adapter.name for adapter in ADAPTERS}
    found = {name: {} for name in names.values()}
    found[names["unet"]]["unet"] = Network(lambda seed: toy.model(seed=seed), toy.text, toy.sample)
    for name, about in toy_dit.TOYS.items():
        make, sample = partial(toy_dit.model, name, torch.float32), partial(toy_dit.sample, name)
        found[names[about.adapter]][name] = Network(make, toy_dit.text, sample)
    return {**found, "any other": {"other": Network(unknown, toy.text, toy.sample)}}


def acts(method, network):
    """True where the method changes the result, False where it refuses the model."""
    import torch
    from steer.patches.shared.schedule import Schedule

    module, arguments = import_module(f"steer.patches.guidance.{method}"), METHODS[method]
    try:
        steered = module.apply(network.model, *arguments(network.text(11), network.other), Schedule())
        out = network.sample(steered, steps=2)
    except ValueError as error:
        if not str(error).startswith("Steer"):
            raise
        return False
    if torch.equal(out, network.plain):
        raise AssertionError(f"{method} does nothing on {type(network.model.model).__name__}, and does not say so")
    return True


def cell(answers):
    """answers: {network: bool} of one architecture."""
    if len(set(answers.values())) == 1:
        return "yes" if all(answers.values()) else "no"
    return "not " + ", ".join(name for name, yes in answers.items() if not yes)


def answers(named):
    """{method: cell} of one architecture, {name: Network}."""
    return {method: cell({name: acts(method, n) for name, n in named.items()}) for method in METHODS}


def names():
    """{method: name in the table}: the first node of its file."""
    from steer.nodes import discover

    found = {}
    for node in discover():
        found.setdefault(node.__module__.split(".")[-1], node.define_schema().node_id.removeprefix("Steer"))
    return found


def table(found, last=None):
    """The lines of {architecture: {method: cell}}; methods that say the same share a column. last: (head, cells)."""
    groups = {}
    for method in next(iter(found.values())):
        groups.setdefault(tuple(each[method] for each in found.values()), []).append(names()[method])
    columns = [(", ".join(group), cells) for cells, group in groups.items()] + ([last] if last else [])
    heads, cells = zip(("model", tuple(found)), *columns, strict=True)
    lines = [heads, ["---"] * len(heads), *zip(*cells, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def guidance():
    """The table of METHODS."""
    from steer.patches.shared.architectures import shared_blocks

    rows = networks()
    sharing = tuple(cell({name: bool(shared_blocks(n.model)) for name, n in v.items()}) for v in rows.values())
    found = {architecture: answers(named) for architecture, named in rows.items()}
    return table(found, ("rows computed once while they are alike", sharing))


def written(begin):
    """The README's table behind the line `begin` as it stands."""
    return README.read_text(encoding="utf-8").partition(begin)[2].partition(END)[0]


def write(begin, made):
    before, _, rest = README.read_text(encoding="utf-8").partition(begin)
    README.write_text(before + begin + made + END + rest.partition(END)[2], encoding="utf-8")


def read(begin):
    """{architecture: {name of a method: cell}} of such a table."""
    heads, _, *rows = ([c.strip() for c in line.strip("| ").split("|")] for line in written(begin).splitlines())
    groups = [head.split(", ") for head in heads[1:]]
    return {
        row[0]: {name: said for group, said in zip(groups, row[1:], strict=True) for name in group} for row in rows
    }


def main():
    host.enter()
    host.load_pack()
    write(BEGIN, guidance())
    print(written(BEGIN))


if __name__ == "__main__":
    main()
