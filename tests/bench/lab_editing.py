"""Where each way to edit stands between doing the edit and keeping the picture, on the lab's trained models.

    python tests/bench/lab_editing.py [--portraits 32] [--sets 4] [--steps 20] [--tables 1 2]

Held-out portraits, each with one factor changed in its caption (hair colour, glasses, expression, hat in turn), so the
truth, the same person with that change, can be drawn. Every set has portraits of its own. Per setting, over all:
    edited    share of pictures in which the reader finds the new value
    kept      share of the other factors that the reader finds as they were
    identity  similarity of the face to the source's: 1 is the same
    outside   PSNR to the source, in dB, where the drawn portraits agree, more than 4 pixels from where they differ
    truth     PSNR to the drawn truth; all pictures as the VAE renders them
    rows      of the network per picture and step of the drawing, without the inversion; 2 is plain CFG
All that start from an inverted picture start from the same (fixed-point), and all draw at the same cfg.
Writes tests/bench/lab_editing.md and the plane of edited and identity, nodes/help/plane.jpg.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import host  # noqa: E402
from bench.lab_inversion_edit import CFG, case, psnr  # noqa: E402
from bench.tables import arguments, make, read  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
PLANE = host.ROOT / "nodes" / "help" / "plane.jpg"
COLUMNS = ("edited", "kept", "identity", "outside", "truth", "rows")
INTRO = (
    "# Ways to edit, on the lab\n\nEach table says by which command it was made; what the columns mean is said at the "
    f"top of `tests/bench/lab_editing.py`. Cfg {CFG}, euler. The lab proves the implementation, not the looks on other "
    "models."
)


def trajectory(lab, steps):
    """The inverted pictures of a `Case`, found once."""
    import torch
    from steer.patches.inversion.invert import invert

    paths = lab.__dict__.setdefault("paths", {})
    if steps not in paths:
        with torch.inference_mode():
            paths[steps] = invert(lab.model, lab.before, lab.latent, lab.sigmas(steps), "fixed-point")
    return paths[steps]


def redraw(lab, steps, model, positive=None, **options):
    """Latents drawn from where the pictures were inverted to, under the new prompt if no other is given."""
    from steer.patches.inversion.invert import InvertedNoise

    found = trajectory(lab, steps)
    start = InvertedNoise(found, lab.model).generate_noise({"samples": lab.latent})
    positive = lab.after if positive is None else positive
    return lab.sample(model, positive, "euler", found.sigmas, start=start, **options)


def figures(lab, latent):
    """{column: [B]} of edited latents."""
    import torch
    from steer.models.lab.portrait import FACTORS

    with torch.inference_mode():
        x = lab.show(latent)
        read, face = lab.reader.read(x), lab.reader(x)[2]
    edited, kept = [], []
    for found, name, before, after in zip(read, lab.factors, lab.sources, lab.edits, strict=True):
        edited.append(found[name][0] == getattr(after, name))
        others = [found[other][0] == getattr(before, other) for other in FACTORS if other != name]
        kept.append(sum(others) / len(others))
    area = 3 * lab.outside.flatten(1).sum(1)
    error = ((x - lab.source) * lab.outside).square().flatten(1).sum(1) / area
    return {
        "edited": torch.tensor(edited).float(),
        "kept": torch.tensor(kept),
        "identity": (face * lab.faces).sum(1),
        "outside": -10 * error.clamp(min=1e-14).log10(),
        "truth": psnr(x, lab.truth),
    }


def with_outside(lab):
    """The `Case` with the region [B, 1, H, W] that an edit should leave alone."""
    import numpy as np
    import torch
    from steer.models.lab.portrait import draw
    from steer.patches.shared.mask import grow

    if not hasattr(lab, "outside"):
        pairs = zip(lab.sources, lab.edits, strict=True)
        differ = np.stack([abs(draw(a).astype(int) - draw(b)).max(-1) > 24 for a, b in pairs])
        lab.outside = 1 - grow(torch.from_numpy(differ).float(), 4)[:, None]
    return lab


def measured(which):
    """Rows of the table of one model."""

    def rows(portraits, sets, steps):
        import torch
        import toy
        from bench.lab_editing_settings import SETTINGS

        labs = [with_outside(case(which, portraits, 7000 + 1000 * n)) for n in range(sets)]
        for lab in labs:
            trajectory(lab, steps)
        for name, models, edit in SETTINGS:
            if which not in models:
                continue
            found = []
            with toy.count_forwards(labs[0].model) as count:
                found.append(figures(labs[0], edit(labs[0], steps, 0)))
            found += [figures(lab, edit(lab, steps, n)) for n, lab in enumerate(labs[1:], 1)]
            mean = {column: float(torch.cat([each[column] for each in found]).mean()) for column in found[0]}
            yield name, {**mean, "rows": count.rows / portraits / steps}

    return rows


TABLES = [("Lab-UNet (eps)", COLUMNS, measured("unet")), ("Lab-DiT (flow)", COLUMNS, measured("dit"))]


def points(text):
    """[(name, edited, identity)] of a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(row[0], float(row[1]), float(row[3])) for row in rows[2:]]


def plane(tables):
    """Each table as a picture: edited to the right, identity upwards, every setting by its number."""
    from PIL import Image, ImageDraw

    side, legend, pad = 460, 330, 40
    sheet = Image.new("RGB", (side + legend, len(tables) * (side + pad)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (title, text) in enumerate(tables.items()):
        top, found = n * (side + pad), points(text)
        low = min(0.0, *(y for _, _, y in found))

        def at(x, y, top=top, low=low):
            return pad + x * (side - 2 * pad), top + pad + (1 - (y - low) / (1 - low)) * (side - 2 * pad)

        draw.rectangle((*at(0, 1), *at(1, low)), outline="black")
        for share in (0.25, 0.5, 0.75):
            draw.line((*at(share, low), *at(share, 1)), fill="#dddddd")
            draw.line((*at(0, low + share * (1 - low)), *at(1, low + share * (1 - low))), fill="#dddddd")
        draw.text((pad, top + 8), f"{title}: edited, 0 to 1, to the right; same face, {low:.2g} to 1, upwards")
        for i, (name, x, y) in enumerate(found, 1):
            px, py = at(x, y)
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill="#2060c0")
            draw.text((px + 4, py - 12), str(i), fill="black")
            draw.text((side + 4, top + pad + 14 * (i - 1)), f"{i} {name}", fill="black")
    return sheet


def main():
    size, numbers = arguments(__doc__, portraits=32, sets=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)
    plane(read(RESULTS)).save(PLANE, quality=88)


if __name__ == "__main__":
    main()
