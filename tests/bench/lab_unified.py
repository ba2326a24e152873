"""What unified attention control keeps of a picture that FlowEdit's sampler edits, on the lab's UNet.

    python tests/bench/lab_unified.py [--portraits 8] [--sets 2] [--steps 8] [--tables 1 2]

Portraits, edits and columns are those of tests/bench/lab_editing.py; cfg 1 for the source and that of the bench for the
edit, in all steps. Writes tests/bench/lab_unified.md.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.lab_editing import figures, with_outside  # noqa: E402
from bench.lab_inversion_edit import CFG, case  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
COLUMNS = ("edited", "kept", "identity", "outside", "truth")
INTRO = (
    "# Unified attention control on the lab\n\nEach table says by which command it was made; what the columns mean is "
    "said at the top of `tests/bench/lab_editing.py`. The lab proves the implementation, not the looks on other models."
)
SETTINGS = [  # name, (self_replace, eta, gamma) or None, cross_replace, blend_threshold around what changes
    ("without", None),
    ("words for 0.7", (0.0, 1.0, 1.0), 0.7),
    ("layout for 0.3, then textures", (0.3, 0.0, 0.0)),
    ("both", (0.3, 0.0, 0.0), 0.7),
    ("layout and textures, eta and gamma 0.5", (0.3, 0.5, 0.5)),
    ("both, eta and gamma 0.5", (0.3, 0.5, 0.5), 0.7),
    ("layout alone, for 0.6", (0.6, 0.0, 1.0)),
    ("layout alone", (1.0, 0.0, 1.0)),
    ("layout alone, words for 0.7", (1.0, 0.0, 1.0), 0.7),
    ("textures alone", (0.0, 1.0, 0.0)),
    ("words for 0.7, blended at 0.3", (0.0, 1.0, 1.0), 0.7, 0.3),
    ("both, blended at 0.3", (0.3, 0.0, 0.0), 0.7, 0.3),
    ("words for 0.7, blended at 0.6", (0.0, 1.0, 1.0), 0.7, 0.6),
    ("both, blended at 0.6", (0.3, 0.0, 0.0), 0.7, 0.6),
]


def aligned(lab):
    """For each picture of a `Case`, which word of its edit is which of its caption."""
    from steer.models.lab.captions import caption
    from steer.models.lab.load import load_clip
    from steer.patches.attention.unifiedattention import prompts

    clip = load_clip()
    return [prompts(clip, caption(a), caption(b))[2] for a, b in zip(lab.sources, lab.edits, strict=True)]


def edit(lab, method, steps, seed, settings=None, cross_replace=0.0, blend=None):
    """Edited latents [B, 4, 16, 16] of a `Case`."""
    import torch
    import toy
    from steer.patches.attention import unifiedattention
    from steer.patches.inversion.flowedit import FlowEdit, guider
    from steer.patches.shared.schedule import Schedule

    def draw(at, **words):
        """Of the pictures `at`, a slice."""
        model, every = lab.model, (lab.before, lab.after, lab.nothing)
        before, after, nothing = ([[text[at], more] for text, more in each] for each in every)
        if settings:
            texts = (before, after, *aligned(lab)[at]) if cross_replace else None
            model = unifiedattention.apply(model, *settings, "auto", Schedule(), cross_replace, texts, **words)
        pair = guider(model, before, after, nothing, 1.0, CFG)
        latent, sigmas = lab.latent[at], lab.sigmas(steps)
        return toy.sample(model, None, FlowEdit(method, steps), guider=pair, start=latent * 0, latent=latent,
                          sigmas=sigmas, seed=seed)

    if blend is None:
        return draw(slice(None))
    drawn = []
    for i, (name, *people) in enumerate(zip(lab.factors, lab.sources, lab.edits, strict=True)):
        words = "hair" if name == "hair_color" else ", ".join(getattr(person, name) for person in people)
        drawn.append(draw(slice(i, i + 1), blend_words=words, blend_threshold=blend))
    return torch.cat(drawn)


def kept(method):
    """Rows of the table of one method."""

    def rows(portraits, sets, steps):
        import torch

        labs = [with_outside(case("unet", portraits, 7000 + 1000 * n)) for n in range(sets)]
        for name, *settings in SETTINGS:
            found = [figures(lab, edit(lab, method, steps, n, *settings)) for n, lab in enumerate(labs)]
            yield name, {column: float(torch.cat([each[column] for each in found]).mean()) for column in COLUMNS}

    return rows


TABLES = [(f"{method}, Lab-UNet (eps)", COLUMNS, kept(method)) for method in ("DDCM", "FlowEdit")]


def main():
    size, numbers = arguments(__doc__, portraits=8, sets=2, steps=8)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".3g")


if __name__ == "__main__":
    main()
