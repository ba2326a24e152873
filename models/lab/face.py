"""Faces of the lab's portraits: whose they are and where their features are, as the reader sees them."""

import torch

from .portrait import FACTORS, GEOMETRY, SIZE, Portrait
from .reader import load_reader

MIDDLE, EYES, MOUTH = {"left": -15, "center": 0, "right": 15}, 65, 91  # as the renderer places them, in pixels


def keypoints(p):
    """Eyes, tip of the nose and corners of the mouth of a portrait, [5, 2], x and y in its pixels."""
    x, spacing, w = SIZE / 2 + MIDDLE[p.position], 14 + 3 * p.eye_spacing, 17 + 4.5 * p.mouth_width
    w = {"happy": w + 2, "sad": 0.9 * w, "angry": 0.9 * w}.get(p.expression, 0.6 * w + 2)
    nose = (x, EYES + 12 + 4.5 * p.nose_length)
    return torch.tensor([(x - spacing, EYES), (x + spacing, EYES), nose, (x - w, MOUTH), (x + w, MOUTH)])


class LabRecogniser:
    """Finds and tells apart the one face of a portrait; what it says of other pictures means nothing."""

    def __init__(self):
        self.reader = load_reader()

    @torch.no_grad()
    def find(self, image, threshold=0.0):
        """(box [1, 4], keypoints [1, 5, 2]) in an image [h, w, 3]."""
        factors, geometry, _ = self.reader(_planes(image[None]))
        said = {name: values[int(logits[0].argmax())]
                for (name, values), logits in zip(FACTORS.items(), factors, strict=True)}
        p = Portrait(**said, **dict(zip(GEOMETRY, geometry[0].tolist(), strict=True)))
        points = keypoints(p)
        x = SIZE / 2 + MIDDLE[p.position]
        rx, ry = 32.5 * (1 + 0.13 * p.face_aspect), 41 * (1 - 0.05 * p.face_aspect)
        box = (x - rx, EYES + 1 - ry, x + rx, EYES + 1 + ry)
        scale = torch.tensor([image.shape[1] / SIZE, image.shape[0] / SIZE])
        return torch.tensor([box]) * scale.repeat(2), points[None] * scale

    @torch.no_grad()
    def embed(self, images, keypoints):
        """[n, 512], of length 1."""
        return self.reader(_planes(images))[2]


def _planes(images):
    return images.movedim(-1, 1).float().cpu()
