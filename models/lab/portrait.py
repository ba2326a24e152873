"""The lab's world: 128x128 cartoon portraits drawn from known factors.

Everything the lab measures rests on this file: the same `Portrait` always gives the same picture and masks,
so "the same person with blue hair" exists as ground truth. Needs Pillow and NumPy only.
"""

import random
from dataclasses import dataclass, replace
from math import cos, pi, radians, sin

import numpy as np
from PIL import Image

from .canvas import INK, SIZE, SUPERSAMPLE, Canvas, arc, box, mix

BLOCK = 4  # side of a "pixel" style block; divides the 8 px grid of the VAE

FACTORS = {
    "style": ("flat", "comic", "pixel"),
    "expression": ("happy", "sad", "angry", "surprised"),
    "position": ("left", "center", "right"),
    "skin": ("light", "tan", "brown", "dark"),
    "hair_style": ("short", "long", "curly", "pigtails", "spiky"),
    "hair_color": ("black", "brown", "blond", "red", "blue", "green"),
    "glasses": ("no glasses", "glasses"),
    "hat": ("no hat", "beanie", "top hat", "crown"),
    "shirt": ("red", "yellow", "green", "blue", "white", "black"),
    "pattern": ("plain", "striped", "dotted", "checkered"),
    "background": ("pink", "orange", "green", "blue", "purple", "white"),
}
GEOMETRY = ("face_aspect", "eye_spacing", "eye_size", "nose_length", "mouth_width", "brow_angle")

HAIR = {
    "black": (28, 26, 34), "brown": (122, 70, 28), "blond": (250, 214, 80),
    "red": (206, 40, 24), "blue": (34, 80, 214), "green": (28, 136, 58),
}
SKIN = {"light": (255, 222, 196), "tan": (226, 170, 112), "brown": (158, 98, 56), "dark": (92, 56, 38)}
SHIRT = {
    "red": (220, 56, 56), "yellow": (248, 216, 64), "green": (70, 170, 84),
    "blue": (62, 120, 232), "white": (244, 244, 244), "black": (44, 44, 50),
}
BACKDROP = {  # lighter than any hair, so that the hair always stands out
    "pink": (252, 152, 192), "orange": (250, 146, 54), "green": (146, 216, 132),
    "blue": (124, 188, 255), "purple": (178, 122, 228), "white": (244, 244, 244),
}
WHITE, GOLD, WOOL, FELT = (250, 250, 250), (252, 204, 28), (0, 150, 150), (36, 32, 44)
BACKGROUND, HEAD_SKIN, HAIR_ON, HAT_ON, BODY = range(5)  # values of the label map


@dataclass(frozen=True)
class Portrait:
    """Discrete factors as words of FACTORS; geometry in [-1, 1]."""

    style: str = "flat"
    expression: str = "happy"
    position: str = "center"
    skin: str = "light"
    hair_style: str = "short"
    hair_color: str = "brown"
    glasses: str = "no glasses"
    hat: str = "no hat"
    shirt: str = "blue"
    pattern: str = "plain"
    background: str = "white"
    face_aspect: float = 0.0
    eye_spacing: float = 0.0
    eye_size: float = 0.0
    nose_length: float = 0.0
    mouth_width: float = 0.0
    brow_angle: float = 0.0

    def __post_init__(self):
        for name, values in FACTORS.items():
            if getattr(self, name) not in values:
                raise ValueError(f"Portrait: {name}={getattr(self, name)!r} is not one of {', '.join(values)}")

    @classmethod
    def from_seed(cls, seed, **fixed):
        """A portrait drawn uniformly from the world; `fixed` factors keep the given value and move no other."""
        rng = random.Random(int(seed))
        drawn = {name: values[int(rng.random() * len(values))] for name, values in FACTORS.items()}
        drawn |= {name: round(2 * rng.random() - 1, 4) for name in GEOMETRY}
        return cls(**(drawn | fixed))

    def with_identity(self, other):
        """These attributes on the face geometry and hair style of `other`."""
        return replace(self, hair_style=other.hair_style, **{name: getattr(other, name) for name in GEOMETRY})

    @property
    def indices(self):
        """Index of each discrete factor in FACTORS order."""
        return [FACTORS[name].index(getattr(self, name)) for name in FACTORS]

    @property
    def geometry(self):
        return [getattr(self, name) for name in GEOMETRY]


def draw_background(canvas, p):
    base = BACKDROP[p.background]
    canvas.mark(BACKGROUND, base, box(0, 0, SIZE, SIZE))
    cells = [(16 * i, 16 * j) for i in range(8) for j in range(8)]
    shapes = {
        "plain": [],
        "striped": [box(x, 0, x + 7.4, SIZE) for x in range(0, SIZE, 16)],
        "dotted": [("ellipse", x + 8, y + 8, 5, 5) for x, y in cells],
        "checkered": [box(x, y, x + 15.4, y + 15.4) for x, y in cells if (x + y) % 32],
    }[p.pattern]
    canvas.mark(BACKGROUND, mix(base, (0, 0, 0), 0.3), *shapes)


def draw_hair_back(canvas, p, x, y, rx, ry):
    def spike(a):
        foot, tip = (rx - 2, ry - 8), (rx + 19, ry + 7)
        at = ((a - 0.24, foot), (a, tip), (a + 0.24, foot))
        return ("polygon", [(x + w * cos(b), y - 8 + h * sin(b)) for b, (w, h) in at])

    def around(start, span):
        return [pi * (start + span * i / 8) for i in range(9)]

    cap = ("ellipse", x, y - 8, rx + 4, ry - 4)
    shapes = {
        "short": [cap],
        "long": [
            ("ellipse", x, y - 6, rx + 10, ry + 2),
            ("polygon", [(x - rx - 10, y - 8), (x + rx + 10, y - 8), (x + rx + 13, 120), (x - rx - 13, 120)]),
        ],
        "curly": [
            ("ellipse", x + (rx + 3) * cos(a), y - 9 + (ry - 3) * sin(a), 11.5, 11.5) for a in around(0.92, 1.16)
        ],
        "pigtails": [cap, *(("ellipse", x + s * (rx + 12), y + dy, 9.5, 15) for s in (-1, 1) for dy in (6, 18))],
        "spiky": [*(spike(a) for a in around(0.98, 1.04)), ("ellipse", x, y - 8, rx + 3, ry - 5)],
    }[p.hair_style]
    canvas.fill(HAIR_ON, HAIR[p.hair_color], *shapes)


def draw_hair_front(canvas, p, x, y, rx, ry):
    """A fringe over the forehead; the whole hairline keeps clear of the brows."""
    low = y - 0.5 * ry
    fringe = arc(x, y, rx + 1.5, ry + 1.5, 208, 332) + arc(x, low - 4, rx * 0.8, 7, 0, -180)
    canvas.fill(HAIR_ON, HAIR[p.hair_color], ("polygon", fringe))


def draw_body(canvas, p, x):
    skin = mix(SKIN[p.skin], (0, 0, 0), 0.14)
    canvas.fill(BODY, SHIRT[p.shirt], ("ellipse", x, 134, 48, 29))
    canvas.fill(BODY, skin, ("polygon", [(x - 11, 96), (x + 11, 96), (x + 13, 110), (x, 118), (x - 13, 110)]))


def draw_eyes(canvas, p, x, y, spacing, skin):
    sad, angry, surprised = (p.expression == e for e in ("sad", "angry", "surprised"))
    size = (1 + 0.26 * p.eye_size) * (1.22 if surprised else 1.0)
    for s in (-1, 1):
        ex = x + s * spacing
        canvas.fill(HEAD_SKIN, WHITE, ("ellipse", ex, y, 7.2 * size, 6.8 * size))
        pupil = 2.4 if surprised else 3.9 * size
        canvas.mark(HEAD_SKIN, INK, ("ellipse", ex, y + (1.5 if sad else 0), pupil, pupil))
        if angry or sad:  # the upper lid, slanted inwards when angry and outwards when sad
            tilt = 5.0 * s * (-1 if sad else 1)
            top, low = y - 8.5 * size - 1, y - 2.5 * size
            lid = [(ex - 9, top), (ex + 9, top), (ex + 9, low - tilt), (ex - 9, low + tilt)]
            canvas.mark(HEAD_SKIN, skin, ("polygon", lid))
        if p.expression == "happy":  # the lower lid pushed up by the cheeks
            canvas.mark(HEAD_SKIN, skin, ("ellipse", ex, y + 9.5 * size, 9 * size, 6 * size))
        if sad:
            canvas.fill(HEAD_SKIN, (60, 170, 250), ("ellipse", ex + 2 * s, y + 12, 3.2, 5.2))


def draw_brows(canvas, p, x, y, spacing):
    lift, angle = {"happy": (-2, -12), "sad": (0, -28), "angry": (3.5, 26), "surprised": (-6.5, 0)}[p.expression]
    angle = radians(angle + 10 * p.brow_angle)
    colour = INK if p.skin != "dark" else (20, 12, 10)
    for s in (-1, 1):
        cx, cy, dx, dy = x + s * spacing, y - 12.5 + lift, 8.5 * cos(angle), 8.5 * sin(angle)
        bend = 3 if p.expression in ("happy", "surprised") else 0
        points = [(cx - s * dx, cy + dy), (cx, cy - bend), (cx + s * dx, cy - dy)]
        canvas.mark(HEAD_SKIN, colour, ("line", 4.2, points))


def draw_mouth(canvas, p, x, y, skin):
    w = 17 + 4.5 * p.mouth_width
    lip = (196, 40, 60) if p.skin in ("light", "tan") else (240, 120, 130)
    inside = (96, 10, 30)
    if p.expression == "happy":
        canvas.fill(HEAD_SKIN, lip, ("polygon", arc(x, y - 5, w + 2, 17, 0, 180)))
        canvas.mark(HEAD_SKIN, inside, ("polygon", arc(x, y - 3, w - 2, 12, 0, 180)))
        teeth = [(x - w + 3, y - 3), (x + w - 3, y - 3), (x + w - 5, y + 2), (x - w + 5, y + 2)]
        canvas.mark(HEAD_SKIN, WHITE, ("polygon", teeth))
    elif p.expression == "sad":
        canvas.fill(HEAD_SKIN, lip, ("line", 5.5, arc(x, y + 9, w * 0.9, 11, 190, 350)))
    elif p.expression == "angry":
        w *= 0.9
        canvas.fill(HEAD_SKIN, lip, box(x - w, y - 6, x + w, y + 8))
        canvas.mark(HEAD_SKIN, WHITE, box(x - w + 2.5, y - 3.5, x + w - 2.5, y + 5.5))
        canvas.mark(HEAD_SKIN, inside, ("line", 1.6, [(x - w + 3, y + 1), (x + w - 3, y + 1)]))
    else:
        canvas.fill(HEAD_SKIN, lip, ("ellipse", x, y + 1, w * 0.6 + 2, 11.5))
        canvas.mark(HEAD_SKIN, inside, ("ellipse", x, y + 1, w * 0.6 - 2, 8))


def draw_glasses(canvas, p, x, y, spacing):
    """Pale lenses in a thick dark frame, 55 px wide: visible on every skin."""
    r = 12.5
    for s in (-1, 1):
        ex = x + s * max(spacing, 14.5)
        canvas.mark(HEAD_SKIN, INK, ("ellipse", ex, y, r + 1.7, r + 1.2))
        canvas.mark(HEAD_SKIN, mix(SKIN[p.skin], (200, 240, 255), 0.75), ("ellipse", ex, y, r - 1.7, r - 2.2))
        canvas.mark(HEAD_SKIN, INK, ("line", 3, [(ex + s * r, y - 2), (ex + s * (r + 6), y - 4)]))
    canvas.mark(HEAD_SKIN, INK, ("line", 3.4, [(x - 3, y - 3), (x + 3, y - 3)]))


def draw_hat(canvas, p, x, y, rx, ry):
    brim = y - 0.56 * ry
    if p.hat == "beanie":
        canvas.fill(HAT_ON, WHITE, ("ellipse", x, 8, 7, 6.5))
        canvas.fill(HAT_ON, WOOL, ("polygon", arc(x, brim, rx + 3, brim - 9, 180, 360)))
        canvas.fill(HAT_ON, WHITE, ("line", 8, [(x - rx, brim - 2), (x + rx, brim - 2)]))
    elif p.hat == "top hat":
        canvas.fill(HAT_ON, FELT, ("polygon", [(x - 25, 2), (x + 25, 2), (x + 23, brim), (x - 23, brim)]))
        canvas.mark(HAT_ON, (216, 40, 48), box(x - 23, brim - 11, x + 23, brim - 3))
        canvas.fill(HAT_ON, FELT, ("line", 6, [(x - rx - 7, brim), (x + rx + 7, brim)]))
    elif p.hat == "crown":
        w, points = 26, []
        for i in range(5):
            points += [(x - w + 13 * i, 7), (x - w + 13 * i + 6.5, 22)]
        canvas.fill(HAT_ON, GOLD, ("polygon", [(x - w, brim), *points[:-1], (x + w, brim)]))
        canvas.mark(HAT_ON, (226, 30, 60), *[("ellipse", x + 15 * i, brim - 7, 3.6, 3.6) for i in (-1, 0, 1)])


def paint(p):
    """Portrait -> (RGB image, label map), both 256x256 Pillow images."""
    canvas = Canvas(outline=1.7 if p.style == "comic" else 0)
    x = SIZE / 2 + {"left": -15, "center": 0, "right": 15}[p.position]
    y, rx, ry = 66, 32.5 * (1 + 0.13 * p.face_aspect), 41 * (1 - 0.05 * p.face_aspect)
    spacing, skin = 14 + 3 * p.eye_spacing, SKIN[p.skin]
    shade = mix(skin, (0, 0, 0), 0.28) if p.skin != "dark" else mix(skin, WHITE, 0.25)
    eyes = y - 1
    draw_background(canvas, p)
    draw_hair_back(canvas, p, x, y, rx, ry)
    draw_body(canvas, p, x)
    ears = [("ellipse", x + s * rx, y + 3, 5.5, 8) for s in (-1, 1)]
    canvas.fill(HEAD_SKIN, skin, *ears, ("ellipse", x, y, rx, ry))
    draw_hair_front(canvas, p, x, y, rx, ry)
    if p.glasses == "glasses":
        draw_glasses(canvas, p, x, eyes, spacing)
    lid = skin if p.glasses == "no glasses" else mix(skin, (200, 240, 255), 0.75)
    draw_eyes(canvas, p, x, eyes, spacing, lid)
    draw_brows(canvas, p, x, eyes, spacing)
    tip = eyes + 12 + 4.5 * p.nose_length
    nose = [(x - 1.5, eyes), (x + 1.5, eyes), (x + 6, tip), (x, tip + 2.5), (x - 6, tip)]
    canvas.mark(HEAD_SKIN, shade, ("polygon", nose))
    draw_mouth(canvas, p, x, y + 25, skin)
    draw_hat(canvas, p, x, y, rx, ry)
    return canvas.picture, canvas.labels


def _reduce(image, p):
    image = image.reduce(SUPERSAMPLE)
    if p.style == "pixel":
        image = image.reduce(BLOCK).resize((SIZE, SIZE), Image.NEAREST)
    return np.asarray(image)


def draw(p):
    """Portrait -> uint8 array [128, 128, 3]."""
    return _reduce(paint(p)[0], p)


def draw_masks(p):
    """Portrait -> {"head", "hair", "background"}: float32 coverage in [0, 1], [128, 128] each.

    The head is everything above the neck: face, visible hair and hat.
    """
    labels = np.asarray(paint(p)[1])
    groups = {"head": (HEAD_SKIN, HAIR_ON, HAT_ON), "hair": (HAIR_ON,), "background": (BACKGROUND,)}
    masks = {name: Image.fromarray(np.isin(labels, values).astype(np.uint8) * 255) for name, values in groups.items()}
    return {name: _reduce(mask, p).astype(np.float32) / 255 for name, mask in masks.items()}
