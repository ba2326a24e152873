"""How well the editing methods of the inversion room edit, and what they keep, on the lab's trained models.

    python tests/bench/lab_inversion_edit.py [--portraits 32] [--seeds 4] [--steps 16] [--tables 1 2 ...]

Held-out portraits, each with one factor changed in its caption (hair colour, glasses, expression, hat in turn), so the
truth, the same person with that change, can be drawn. Per setting, over portraits and seeds:
    edited      share of pictures in which the reader finds the new value
    identity    similarity of the face to the source's, 1 is the same; the drawn truth has about 0.97
    background  PSNR to the source where both source and truth show background
    PSNR        to the drawn truth; all pictures as the VAE renders them
Reconstructions, with the source's own caption:
    PSNR        to the source;  error  largest difference of a latent
Writes tests/bench/lab_inversion_edit.md.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.tables import arguments, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
EDITED = ("hair_color", "glasses", "expression", "hat")
CFG = 2.5


class Case:
    """Portraits and their edits for one lab model, encoded."""

    def __init__(self, which, portraits, first=7000):
        import numpy as np
        import torch
        from steer.models.lab import data
        from steer.models.lab.captions import caption
        from steer.models.lab.evaluate import conditioning
        from steer.models.lab.load import load_model
        from steer.models.lab.portrait import FACTORS, draw, draw_masks
        from steer.models.lab.reader import load_reader

        self.model, clip, self.vae = load_model(which)
        self.reader, self.which = load_reader(), which
        self.sources, pictures = data.held_out(portraits, first)
        self.factors = [EDITED[i % len(EDITED)] for i in range(portraits)]
        self.edits = []
        for i, (p, name) in enumerate(zip(self.sources, self.factors, strict=True)):
            others = [value for value in FACTORS[name] if value != getattr(p, name)]
            self.edits.append(replace(p, **{name: others[i % len(others)]}))
        drawn = np.stack([draw(p) for p in self.edits])
        with torch.inference_mode():
            self.latent, truth = (self.vae.encode(torch.from_numpy(x).float() / 255) for x in (pictures, drawn))
            self.source, self.truth = self.show(self.latent), self.show(truth)
            self.faces = self.reader(self.source)[2]
        masks = [
            draw_masks(p)["background"] * draw_masks(e)["background"]
            for p, e in zip(self.sources, self.edits, strict=True)
        ]
        self.background = torch.from_numpy(np.stack(masks)).float()[:, None]
        texts = ([caption(p) for p in self.sources], [caption(e) for e in self.edits], [""] * portraits)
        self.before, self.after, self.nothing = (conditioning(clip, text) for text in texts)

    def show(self, latent):
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)

    def sigmas(self, steps):
        import toy

        return toy.sigmas(self.model, steps, "simple" if self.which == "dit" else "normal")

    def noise(self, seed):
        import torch

        return torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(seed))

    def sample(self, model, positive, sampler, sigmas, cfg=CFG, start=None, **options):
        import toy

        start = self.noise(0) * 0 if start is None else start
        return toy.sample(
            model, cfg, sampler, positive=positive, negative=self.nothing, start=start, latent=self.latent,
            sigmas=sigmas, **options,
        )

    def figures(self, latents):
        """Of edited latents, one batch per seed."""
        import torch

        rows = []
        for latent in latents:
            with torch.inference_mode():
                x = self.show(latent)
                read, face = self.reader.read(x), self.reader(x)[2]
            hit = [r[f][0] == getattr(e, f) for r, f, e in zip(read, self.factors, self.edits, strict=True)]
            area = 3 * self.background.flatten(1).sum(1)
            behind = ((x - self.source) * self.background).square().flatten(1).sum(1) / area
            rows.append(torch.stack([
                torch.tensor(hit).float(), (face * self.faces).sum(1), -10 * behind.log10(), psnr(x, self.truth),
            ]))
        names = ("edited", "identity", "background", "PSNR")
        return dict(zip(names, torch.cat(rows, 1).mean(1).tolist(), strict=True))


def psnr(x, y):
    return -10 * (x - y).square().flatten(1).mean(1).clamp(min=1e-14).log10()


@cache
def case(which, portraits, first=7000):
    return Case(which, portraits, first)


def sdedit(lab, steps, last, seed, cfg=CFG):
    """The host's own way: noise of the last steps, and the new prompt from there."""
    return lab.sample(lab.model, lab.after, "euler", lab.sigmas(steps)[-last - 1 :], cfg, lab.noise(seed))


def flowedit(lab, steps, last, seed, method="FlowEdit", cfgs=(1.0, CFG)):
    from steer.patches.inversion.flowedit import FlowEdit, guider

    pair = guider(lab.model, lab.before, lab.after, lab.nothing, *cfgs)
    return lab.sample(lab.model, None, FlowEdit(method, last), lab.sigmas(steps), guider=pair, seed=seed)


def editfriendly(lab, steps, last, seed, cfg=CFG, positive=None):
    import torch
    from steer.patches.inversion import editfriendly as method

    sigmas = lab.sigmas(steps)[-last - 1 :]
    with torch.inference_mode():
        found = method.invert(lab.model, lab.before, lab.nothing, lab.latent, sigmas, seed, CFG)
    return lab.sample(lab.model, lab.after if positive is None else positive, found, sigmas, cfg)


def rfinversion(lab, steps, eta, end, seed, positive=None, gamma=0.5, cfg=CFG):
    import torch
    from steer.patches.inversion import rfinversion as method
    from steer.patches.inversion.invert import InvertedNoise
    from steer.patches.shared.schedule import Schedule

    with torch.inference_mode():
        found = method.invert(lab.model, lab.nothing, lab.latent, lab.sigmas(steps), lab.noise(seed), gamma)
    start = InvertedNoise(found, lab.model).generate_noise({"samples": lab.latent})
    model = method.apply(lab.model, found, eta, Schedule(0.0, end))
    return lab.sample(model, lab.after if positive is None else positive, "euler", found.sigmas, cfg, start)


def shares(steps):
    """Last steps of the schedule: a quarter, a half, three quarters, all but one."""
    return steps // 4, steps // 2, steps * 3 // 4, steps - 1


def edits(which, portraits, seeds, steps):
    """Rows of the table of one model."""
    lab = case(which, portraits)
    methods = {
        "SDEdit": sdedit,
        "FlowEdit": flowedit,
        "DDCM": lambda *a: flowedit(*a, method="DDCM"),
        "edit-friendly": editfriendly,
    }
    for name, run in methods.items():
        for last in shares(steps):
            latents = [run(lab, steps, last, seed) for seed in range(seeds)]
            yield f"{name}, last {last} of {steps} steps", lab.figures(latents)
    if which == "dit":
        for eta, end in ((0.9, 0.25), (0.9, 0.5), (0.6, 0.5), (0.3, 0.5)):
            latents = [rfinversion(lab, steps, eta, end, seed) for seed in range(seeds)]
            yield f"RF-inversion, eta {eta} to {end:.0%}", lab.figures(latents)


def returns(portraits, seeds, steps):
    """PSNR to the source under its own caption, over eta."""
    lab = case("dit", portraits)
    for eta in (0.0, 0.25, 0.5, 0.75, 1.0):
        latents = [rfinversion(lab, steps, eta, 1.0, seed, lab.before) for seed in range(seeds)]
        yield f"eta {eta}", same(lab, latents)


def exact(portraits, seeds, steps):
    for which in ("unet", "dit"):
        lab = case(which, portraits)
        latents = [editfriendly(lab, steps, steps - 1, seed, positive=lab.before) for seed in range(seeds)]
        yield f"{which}, cfg {CFG}", same(lab, latents)


def offsets(portraits, seeds, steps):
    """Direct inversion, which draws no noise: each portrait once, whatever the seeds."""
    import torch
    from steer.patches.inversion import directinversion
    from steer.patches.inversion.invert import InvertedNoise, invert
    from steer.patches.shared.schedule import Schedule

    for which, cfgs in (("unet", (CFG, 2 * CFG)), ("dit", (CFG,))):
        lab = case(which, portraits)
        with torch.inference_mode():
            found = invert(lab.model, lab.before, lab.latent, lab.sigmas(steps))
        start = InvertedNoise(found, lab.model).generate_noise({"samples": lab.latent})
        for cfg in cfgs:
            for o in (0.0, 0.5, 0.75, 1.0):
                model = directinversion.apply(lab.model, found, o, Schedule())
                latent = lab.sample(model, lab.after, "euler", found.sigmas, cfg, start)
                yield f"{which}, cfg {cfg:g}, offset {o:g}", lab.figures([latent])


def retraced(portraits, seeds, steps):
    """Inverted and redrawn at cfg 1, in as many evaluations."""
    import torch
    from steer.patches.inversion import rfsolver
    from steer.patches.inversion.invert import InvertedNoise, invert

    for which in ("unet", "dit"):
        lab = case(which, portraits)
        for evaluations in (8, 16, 32):
            for method, sampler, each in (("ddim / euler", "euler", 1), ("rf-solver", rfsolver.sampler(), 2)):
                with torch.inference_mode():
                    found = invert(lab.model, lab.before, lab.latent, lab.sigmas(evaluations // each), method)
                start = InvertedNoise(found, lab.model).generate_noise({"samples": lab.latent})
                latent = lab.sample(lab.model, lab.before, sampler, found.sigmas, 1.0, start)
                yield f"{which}, {method}, {evaluations} evaluations", same(lab, [latent])


def same(lab, latents):
    import torch

    with torch.inference_mode():
        near = torch.cat([psnr(lab.show(x), lab.source) for x in latents]).mean()
    return {"PSNR": float(near), "error": max(float((x - lab.latent).abs().max()) for x in latents)}


EDITS = ("edited", "identity", "background", "PSNR")
TABLES = (
    ("Edits, Lab-UNet (eps)", EDITS, lambda **size: edits("unet", **size)),
    ("Edits, Lab-DiT (flow)", EDITS, lambda **size: edits("dit", **size)),
    ("RF-inversion over eta in all steps, Lab-DiT", ("PSNR", "error"), returns),
    ("Edit-friendly inversion, source prompt", ("PSNR", "error"), exact),
    ("RF-Solver, inverted and redrawn", ("PSNR", "error"), retraced),
    ("Direct inversion over offset", EDITS, offsets),
)


INTRO = (
    "# What editing does on the lab\n\nEach table says by which command it was made; what the columns mean is said "
    f"at the top of `tests/bench/lab_inversion_edit.py`. Cfg {CFG} towards the new prompt, unless a row says otherwise."
    " The lab proves the implementation, not the looks on other models."
)


def main():
    size, numbers = arguments(__doc__, portraits=32, seeds=4, steps=16)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers, ".3g")


if __name__ == "__main__":
    main()
