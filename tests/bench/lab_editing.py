"""Where each way to edit stands between doing the edit and keeping the picture, on the lab's trained models.

    python tests/bench/lab_editing.py [--portraits 32] [--sets 4] [--steps 20] [--tables 1 2]
                                       [--settings NAME ...]

Held-out portraits, each with one factor changed in its caption (hair colour, glasses, expression, hat in turn), so the
truth, the same person with that change, can be drawn. Every set has portraits of its own. Per setting, over all:
    edited    share of pictures in which the reader finds the new value
    kept      share of the other factors that the reader finds as they were
    identity  similarity of the face to the source's: 1 is the same
    outside   PSNR to the source, in dB, where the drawn portraits agree, more than 4 pixels from where they differ
    truth     PSNR to the drawn truth; all pictures as the VAE renders them
    rows      of the network per picture and step of the drawing, without the inversion; 2 is plain CFG
All that start from an inverted picture start from the same (fixed-point), and all draw at the same cfg. FluxSpace's
prompts say nothing of the edit. FreeControl and DiffuseIT draw from noise of their own, under the new prompt.
Writes tests/bench/lab_editing.md and planes of edited against identity and outside, nodes/help/plane.jpg.
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


def redraw(lab, steps, model, positive=None, path=None, **options):
    """Latents drawn from where the pictures were inverted to, by `trajectory` if no other path is given, under the new
    prompt if no other is."""
    from steer.patches.inversion.invert import InvertedNoise

    found = trajectory(lab, steps) if path is None else path
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

    def rows(portraits, sets, steps, settings=()):
        import torch
        import toy
        from bench.lab_editing_settings import SETTINGS

        labs = [with_outside(case(which, portraits, 7000 + 1000 * n)) for n in range(sets)]
        for lab in labs:
            trajectory(lab, steps)
        for name, models, edit in SETTINGS:
            if which not in models or settings and not name.startswith(tuple(settings)):
                continue
            found = []
            with toy.count_forwards(labs[0].model) as count:
                found.append(figures(labs[0], edit(labs[0], steps, 0)))
            found += [figures(lab, edit(lab, steps, n)) for n, lab in enumerate(labs[1:], 1)]
            mean = {column: float(torch.cat([each[column] for each in found]).mean()) for column in found[0]}
            yield name, {**mean, "rows": count.rows / portraits / steps}

    return rows


TABLES = [("Lab-UNet (eps)", COLUMNS, measured("unet")), ("Lab-DiT (flow)", COLUMNS, measured("dit"))]


def points(text, column):
    """[(name, edited, `column`)] of a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    at = rows[0].index(column)
    return [(row[0], float(row[1]), float(row[at])) for row in rows[2:]]


def plane(tables):
    """Each table as two pictures, over the likeness of the face and over the PSNR outside: edited to the right, kept
    upwards, names beside."""
    from PIL import Image, ImageDraw

    side = 16 * max(text.count("\n") for text in tables.values())  # room for the names
    wide, high = side + 310, side + 80
    sheet = Image.new("RGB", (2 * wide, len(tables) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (title, text) in enumerate(tables.items()):
        for m, (column, kept) in enumerate((("identity", "same face, 1 is the same"), ("outside", "PSNR outside, dB"))):
            panel(draw, m * wide, n * high, f"{title}: {kept}, over edited", points(text, column), side)
    return sheet


def panel(draw, left, top, title, found, side, pad=40):
    """One of the pictures; each name stands at the height of its point, or as near below it as there is room."""
    ends = []
    for axis in (1, 2):
        values = [point[axis] for point in found]
        ends.append((min(values), max(values)))

    def at(x, y):
        x, y = ((v - low) / (high - low) for v, (low, high) in zip((x, y), ends, strict=True))
        return left + pad + 10 + x * (side - 20), top + pad - 10 + (1 - y) * (side - 20)

    box = left + pad, top + pad - 20, left + pad + side, top + pad - 20 + side
    draw.text((left + pad, top + 4), title, fill="black")
    draw.rectangle(box, outline="black")
    for i in range(5):
        x, y = (low + i / 4 * (high - low) for low, high in ends)
        px, py = at(x, y)
        draw.line((px, box[1], px, box[3]), fill="#e4e4e4")
        draw.line((box[0], py, box[2], py), fill="#e4e4e4")
        draw.text((px - 10, box[3] + 4), f"{x:.2f}", fill="black")
        draw.text((left + 8, py - 6), f"{y:.3g}", fill="black")
    found, last = sorted(found, key=lambda point: -point[2]), box[1] - 16
    for i, (name, x, y) in enumerate(found):
        px, py = at(x, y)
        last = min(max(last + 16, py - 6), box[3] - 16 * (len(found) - i))
        draw.line((px, py, box[2] + 12, last + 6), fill="#9db8e0")
        draw.text((box[2] + 16, last), name, fill="black")
    for _, x, y in found:
        px, py = at(x, y)
        draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill="#2060c0")


def main():
    size, numbers = arguments(__doc__, True, portraits=32, sets=4, steps=20)
    host.enter()
    host.load_pack()
    make(RESULTS, INTRO, TABLES, size, numbers)
    plane(read(RESULTS)).save(PLANE, quality=88)


if __name__ == "__main__":
    main()
