"""What Prompt-to-Prompt does on the lab's trained models: one word swapped, one word weighed.

    python tests/bench/lab_words.py [--portraits 16] [--seeds 4] [--steps 12] [--tables 1 2 3 4]

Portraits drawn from noise by a prompt that names style, hair style and hair colour, and their trajectories; then drawn
from the same noise under a prompt with another hair colour, once without and then with Prompt-to-Prompt ("replace").
    edited  share in which the reader finds the new colour
    lost    share of the other factors, which neither prompt changes, that the reader no longer finds as they were
    face    1 - similarity of the face to the source's, from the embedding of its geometry; 0 is the same
    PSNR    to the source
Of a weighed word: the prompt says "glasses" from the start, and only the weight of that word is changed.
    glasses share in which the reader finds them;  certainty its mean probability of them;  face, PSNR as above
Writes tests/bench/lab_words.md.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
CFG = 2.5
SWAP, WEIGH = ("edited", "lost", "face", "PSNR"), ("glasses", "certainty", "face", "PSNR")
WINDOWS = ((0.8, 0.0), (0.0, 0.4), (0.4, 0.4), (0.8, 0.4), (0.8, 0.8))
WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


class Words:
    """Pictures of some prompts on one lab model, with their trajectories, and what the reader says of them."""

    def __init__(self, which, portraits, steps, seed, weighed=False):
        import torch
        import toy
        from steer.models.lab import data
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning
        from steer.models.lab.load import load_model
        from steer.models.lab.portrait import FACTORS
        from steer.models.lab.reader import load_reader
        from steer.patches.shared.trajectory import Trajectory, fingerprint
        from steer.patches.shared.words import read

        self.model, self.clip, self.vae = load_model(which)
        self.reader = load_reader()
        people, _ = data.held_out(portraits, 9000 + 100 * seed)
        if weighed:
            people = [replace(p, glasses="glasses") for p in people]
            named = ("style", "expression", "hair_style", "glasses")
            self.edits = people
        else:
            named, colors = ("style", "hair_style", "hair_color"), FACTORS["hair_color"]
            colors = [[c for c in colors if c != p.hair_color][i % (len(colors) - 1)] for i, p in enumerate(people)]
            self.edits = [replace(p, hair_color=color) for p, color in zip(people, colors, strict=True)]
        texts = [[caption(p, named) for p in group] for group in (people, self.edits)]
        self.before, self.after = (conditioning(self.clip, text) for text in texts)
        self.nothing = conditioning(self.clip, [""] * portraits)
        columns = self.before[0][0].shape[1]
        self.prompts = [[read(self.clip, each, columns) for each in text] for text in texts]
        self.sigmas = toy.sigmas(self.model, steps, "simple" if which == "dit" else "normal")
        self.start = torch.randn(portraits, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        seen = []
        source = self.sample(self.model, self.before, callback=lambda i, D, x, n: seen.append(x.float().clone()))
        seen.append(self.model.model.process_latent_in(source).float())
        self.path = Trajectory(self.sigmas, torch.stack(seen), fingerprint(self.model), self.before)
        self.source, self.read, self.face = self.look(source)

    def sample(self, model, positive, **options):
        import toy

        return toy.sample(
            model, CFG, "euler", positive=positive, negative=self.nothing, start=self.start, sigmas=self.sigmas,
            **options,
        )

    def look(self, latent):
        import torch

        with torch.inference_mode():
            x = self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)
            return x, self.reader.read(x), self.reader(x)[2]

    def edit(self, operation="replace", **options):
        from steer.patches.attention import prompttoprompt
        from steer.patches.shared.alignment import align

        pairs = [align(a, b, operation) for a, b in zip(*self.prompts, strict=True)]
        model = prompttoprompt.edit(self.model, self.path, self.before, self.after, pairs, **options)
        return self.sample(model, self.after)

    def figures(self, latent):
        """{column: [B]}."""
        import torch

        x, read, face = self.look(latent)
        others = [name for name in read[0] if name != "hair_color"]
        lost = [sum(r[k][0] != s[k][0] for k in others) / len(others) for r, s in zip(read, self.read, strict=True)]
        hit = [r["hair_color"][0] == e.hair_color for r, e in zip(read, self.edits, strict=True)]
        return {
            "edited": torch.tensor(hit).float(),
            "lost": torch.tensor(lost),
            "glasses": torch.tensor([r["glasses"][0] == "glasses" for r in read]).float(),
            "certainty": torch.tensor([c if v == "glasses" else 1 - c for v, c in (r["glasses"] for r in read)]),
            "face": 1 - (face * self.face).sum(1),
            "PSNR": -10 * (x - self.source).square().flatten(1).mean(1).log10(),
        }


def prompttoprompt(lab, path, **options):
    """The lab's model under the edits of a `bench.lab_inversion_edit.Case`."""
    from steer.models.lab.captions import caption
    from steer.models.lab.load import load_clip
    from steer.patches.attention import prompttoprompt as method
    from steer.patches.shared.alignment import align
    from steer.patches.shared.words import read

    clip, columns = load_clip(lab.which), lab.before[0][0].shape[1]
    prompts = ([read(clip, caption(p), columns) for p in group] for group in (lab.sources, lab.edits))
    pairs = [align(a, b, "refine") for a, b in zip(*prompts, strict=True)]
    return method.edit(lab.model, path, lab.before, lab.after, pairs, **options)


@cache
def words(which, portraits, steps, seed, weighed=False):
    return Words(which, portraits, steps, seed, weighed)


def mean(cases, run, columns):
    """Of run(case) -> latent over all cases, {column: mean}."""
    import torch

    found = [case.figures(run(case)) for case in cases]
    return {name: float(torch.cat([f[name] for f in found]).mean()) for name in columns}


def swaps(which, portraits, seeds, steps):
    cases = [words(which, portraits, steps, seed) for seed in range(seeds)]
    yield "re-prompt, same noise", mean(cases, lambda c: c.sample(c.model, c.after), SWAP)
    for cross, within in WINDOWS:
        run = {"cross_replace": cross, "self_replace": within}
        yield f"cross_replace {cross}, self_replace {within}", mean(cases, lambda c, run=run: c.edit(**run), SWAP)
    yield "0.8, 0.4, blend_words hair", mean(cases, lambda c: c.edit(blend_words="hair"), SWAP)


def weights(which, portraits, seeds, steps):
    cases = [words(which, portraits, steps, seed, True) for seed in range(seeds)]
    for weight in WEIGHTS:
        run = {"weights": f"glasses: {weight}", "cross_replace": 1.0}
        yield f"glasses: {weight:g}", mean(cases, lambda c, run=run: c.edit(**run), WEIGH)


TABLES = (
    ("One word swapped, Lab-UNet (eps)", SWAP, lambda **size: swaps("unet", **size)),
    ("One word swapped, Lab-DiT (flow)", SWAP, lambda **size: swaps("dit", **size)),
    ("One word weighed, Lab-UNet (eps), cross_replace 1", WEIGH, lambda **size: weights("unet", **size)),
    ("One word weighed, Lab-DiT (flow), cross_replace 1", WEIGH, lambda **size: weights("dit", **size)),
)
INTRO = (
    "# Prompt-to-Prompt on the lab\n\nEach table says by which command it was made; what the columns mean is said at "
    f"the top of `tests/bench/lab_words.py`. Cfg {CFG}, euler. The lab proves the implementation, not the looks on "
    "other models."
)


def main():
    size, numbers = arguments(__doc__, portraits=16, seeds=4, steps=12)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".3g")


if __name__ == "__main__":
    main()
