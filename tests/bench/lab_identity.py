"""What the lab's adapters take of a reference, and what the prompt still gets.

    python tests/bench/lab_identity.py [--portraits 8] [--seeds 2] [--steps 10] [--bf16] [--tables 1]

References are portraits that nothing was trained on; euler, cfg 5, each item of a batch with a reference of its own.
    obeyed     share of the factors named in the prompt, all other than in the reference, that the reader finds as named
    taken      share of the other factors that it finds as in the reference
    identity   cosine of the reader's face embeddings of the picture and of its reference
    strangers  the same with the references of other pictures: what chance gives
Table 1: an IP-Adapter (plus layout); the prompt names expression, hat, shirt and background. Table 2: a FaceID
adapter; the reference shares nothing with the prompt but the face, and the prompt names all factors. Table 3: InstantID
with its ControlNet, for the same, except that the reference has position and expression too, which its keypoints show.
Table 4: an IP-Adapter (InstantX layout) of the Lab-DiT, for prompts as of table 1, at cfg 4. Table 5: FastComposer, two
persons in one picture, of whom the prompt names two factors each; the halves are read one by one, taken is as in a
person's own reference, mixed as in the other's, where they differ, nearer the share of persons whose face is more alike
to their own. Table 6: PuLID on the Lab-DiT, as table 2, at cfg 4. Tables 7 and 8: two persons as in table 5, by their
words, by words in regions, and with InstantID (UNet) or PuLID (DiT) for the face of each. The last row is the wanted
portrait itself, drawn and sent through the VAE. Writes tests/bench/lab_identity.md.
By default the tables of all adapters that are there.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
INTRO = (
    "# Adapters on the lab\n\nThe table says by which command it was made; what the columns mean is said at the top of "
    "`tests/bench/lab_identity.py`. The lab proves the implementation, not the likeness on other models."
)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def pictures(portraits, seeds, steps):
    from steer.models.lab import likeness

    yield from rows(likeness.by_picture, likeness.cases(portraits), likeness.NAMED, seeds, steps)


def faces(portraits, seeds, steps):
    from steer.models.lab import likeness
    from steer.models.lab.portrait import FACTORS

    yield from rows(likeness.by_face, likeness.faces(portraits), tuple(FACTORS), seeds, steps)


def keypoints(portraits, seeds, steps):
    from steer.models.lab import likeness
    from steer.models.lab.portrait import FACTORS

    case, draw = likeness.faces(portraits, kept=likeness.POSED), likeness.drawn_alone
    given = {f"strength {s:g}": (s, s) for s in STRENGTHS}
    given |= {"words alone, 1": (1.0, 0.0), "ControlNet alone, 1": (0.0, 1.0)}
    yield from rows(lambda two: likeness.by_keypoints(*two), case, tuple(FACTORS), seeds, steps, given, draw=draw)


def flow(portraits, seeds, steps):
    from steer.models.lab import evaluate, likeness

    def by(strength):
        return likeness.by_picture(strength, "adapter_dit.safetensors")

    yield from rows(by, likeness.cases(portraits), likeness.NAMED, seeds, steps, which="dit", **evaluate.FLOW)


def two(portraits, seeds, steps):
    from steer.models.lab import persons

    yield from persons.curve(portraits, seeds=seeds, steps=steps).items()


def placed(which, portraits, seeds, steps):
    from steer.models.lab import evaluate, persons

    options = evaluate.FLOW if which == "dit" else {}
    yield from persons.with_faces(which, portraits, seeds=seeds, steps=steps, **options).items()


def eyes(portraits, seeds, steps):
    from steer.models.lab import evaluate, likeness
    from steer.models.lab.portrait import FACTORS

    options = dict(which="dit", draw=likeness.drawn_alone, **evaluate.FLOW)
    yield from rows(likeness.by_eyes, likeness.faces(portraits), tuple(FACTORS), seeds, steps, **options)


def rows(steer, case, named, seeds, steps, strengths=None, which="unet", draw=None, **options):
    """strengths: {setting: what `steer` takes}."""
    from steer.models.lab import likeness
    from steer.models.lab.load import load_model
    from steer.models.lab.reader import load_reader

    models, reader, draw = load_model(which), load_reader(), draw or likeness.drawn
    for setting, strength in (strengths or {f"strength {s:g}": s for s in STRENGTHS}).items():
        yield setting, draw(reader, models, steer(strength), case, named, seeds, steps=steps, **options)
    yield "the wanted portrait", likeness.truth(reader, models[2], case, named)


TWO = "obeyed", "taken", "mixed", "nearer", "identity", "other's"
TABLES = [
    ("IP-Adapter, Lab-UNet", ("obeyed", "taken", "identity", "strangers"), pictures),
    ("FaceID, Lab-UNet", ("obeyed", "identity", "strangers"), faces),
    ("InstantID, Lab-UNet", ("obeyed", "identity", "strangers"), keypoints),
    ("IP-Adapter, Lab-DiT", ("obeyed", "taken", "identity", "strangers"), flow),
    ("FastComposer, Lab-UNet", TWO, two),
    ("PuLID, Lab-DiT", ("obeyed", "identity", "strangers"), eyes),
    ("Two persons, Lab-UNet", TWO, partial(placed, "unet")),
    ("Two persons, Lab-DiT", TWO, partial(placed, "dit")),
]
FILES = ("adapter", "adapter_faceid", "adapter_instantid", "adapter_dit", "adapter_fastcomposer", "adapter_pulid",
         "adapter_instantid", "adapter_pulid")  # fmt: skip


def main():
    size, numbers = arguments(__doc__, portraits=8, seeds=2, steps=10)
    host.enter()
    host.load_pack()
    from steer.models.lab.load import WEIGHTS

    there = [n for n, file in enumerate(FILES, 1) if (WEIGHTS / f"{file}.safetensors").is_file()]
    make(RESULTS, INTRO, TABLES, size, numbers or there)


if __name__ == "__main__":
    main()
