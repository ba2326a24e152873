"""A drawing surface that fills a picture and a label map with the same shapes. Coordinates are in 128 px units."""

from math import cos, radians, sin

from PIL import Image, ImageDraw

SIZE = 128
SUPERSAMPLE = 2  # drawn at 256 px and box-filtered down
INK = (22, 20, 26)


def mix(a, b, t):
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


class Canvas:
    """Shapes are tuples (kind, *numbers) of the kinds ellipse, polygon and line; labels start as 0."""

    def __init__(self, outline):
        size = (SIZE * SUPERSAMPLE,) * 2
        self.picture, self.labels = Image.new("RGB", size), Image.new("L", size)
        self.pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.labels)
        self.outline = outline

    def fill(self, label, colour, *shapes):
        """Fill the union of `shapes`; the comic style inks the rim of the union first."""
        if self.outline:
            self._draw(label, INK, self.outline, shapes)
        self._draw(label, colour, 0, shapes)

    def mark(self, label, colour, *shapes):
        """Fill without a rim; ink itself is a little bolder in the comic style."""
        self._draw(label, colour, self.outline if colour == INK else 0, shapes)

    def _draw(self, label, colour, grow, shapes):
        for kind, *spec in shapes:
            for pen, value in zip(self.pens, (colour, label), strict=True):
                getattr(self, "_" + kind)(pen, value, grow, *spec)

    def _ellipse(self, pen, value, grow, x, y, rx, ry):
        k, rx, ry = SUPERSAMPLE, rx + grow, ry + grow
        pen.ellipse([(x - rx) * k, (y - ry) * k, (x + rx) * k, (y + ry) * k], fill=value)

    def _polygon(self, pen, value, grow, points):
        pen.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=value)
        if grow:
            self._line(pen, value, grow, 0, [*points, points[0]])

    def _line(self, pen, value, grow, width, points):
        width = (width + 2 * grow) * SUPERSAMPLE
        points = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]
        pen.line(points, fill=value, width=round(width), joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=value)


def box(x0, y0, x1, y1):
    return ("polygon", [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def arc(x, y, rx, ry, start, end, steps=10):
    """Points of an elliptic arc; angles in degrees, clockwise from the right as in Pillow."""
    angles = [radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * cos(a), y + ry * sin(a)) for a in angles]
