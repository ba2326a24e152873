"""A face: who it is as numbers, where its features are, and how it is cut out."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import grid_sample, normalize

# eyes, nose and corners of the mouth (x, y) of ArcFace's aligned face of 112 x 112 (Deng et al. 2019, arXiv 1801.07698)
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
ALIGNED = 112


@dataclass(frozen=True, eq=False)
class Face:
    """Faces of one person, or one for each item of a batch, as a value on the socket STEER_FACE.

    embedding: [n, E] as the recogniser gives it, not normalised.
    keypoints: [n, 5, 2], x and y in pixels: left eye, right eye, nose, left and right corner of the mouth, as seen in
        the picture.  image: [n, h, w, 3] in 0..1, in which they are. Both None for an embedding alone.
    """

    embedding: torch.Tensor = field(repr=False)
    keypoints: torch.Tensor = field(default=None, repr=False)
    image: torch.Tensor = field(default=None, repr=False)

    @property
    def identity(self):
        """The embedding with length 1, [n, E]."""
        return normalize(self.embedding.float(), dim=-1)

    def crop(self, size):
        """The aligned faces, [n, size, size, 3]: black where the picture ends."""
        if self.image is None:
            raise ValueError("the face comes without its picture; take one from SteerFace with an image.")
        return align(self.image, self.keypoints, size)


def face_of(value):
    """A `Face` from what is on a STEER_FACE socket: one, or a raw embedding [E] or [n, E] of another pack."""
    if isinstance(value, Face):
        return value
    if isinstance(value, torch.Tensor) and value.ndim in (1, 2) and value.is_floating_point():
        return Face(value.reshape(-1, value.shape[-1]).float().cpu())
    raise ValueError(f"face is {type(value).__name__}; wire SteerFace, or a tensor of shape [faces, 512].")


def template(size):
    """Where the five points lie in an aligned face of `size`: [5, 2]. Sizes by 128 leave room at both sides, as in
    insightface."""
    points = torch.tensor(TEMPLATE)
    if size % ALIGNED == 0:
        return points * (size / ALIGNED)
    return (points + torch.tensor([8.0, 0.0])) * (size / 128)


def similarity(points, target):
    """[n, 2, 3]: turn, scale and shift that bring points [n, 5, 2] nearest to target [5, 2] (least squares)."""
    s, d = (torch.view_as_complex(t.double().contiguous()) for t in (points, target.expand_as(points)))
    centre, goal = s.mean(1, keepdim=True), d.mean(1, keepdim=True)
    s, d = s - centre, d - goal
    a = (s.conj() * d).sum(1, keepdim=True) / (s.abs() ** 2).sum(1, keepdim=True)
    shift = goal - a * centre
    rows = torch.stack((a.real, -a.imag, shift.real, a.imag, a.real, shift.imag), -1)
    return rows.reshape(-1, 2, 3).float()


def align(images, keypoints, size, target=None):
    """Faces [n, size, size, C] cut out of images [n, h, w, C] so that their five points lie on `target` [5, 2], None
    for the `template`; 0 where the picture ends."""
    h, w = images.shape[1:3]
    target = template(size) if target is None else target
    m = similarity(keypoints.to(images.device), target.to(images.device))
    turn, shift = m[:, :, :2], m[:, :, 2]
    back = torch.linalg.inv(turn)
    y, x = torch.meshgrid(*(torch.arange(size, device=images.device, dtype=torch.float32),) * 2, indexing="ij")
    pixels = torch.stack((x, y), -1).reshape(1, -1, 2) - shift[:, None]
    source = (pixels @ back.mT).reshape(-1, size, size, 2)
    grid = 2 * source / torch.tensor([max(w - 1, 1), max(h - 1, 1)], device=images.device) - 1
    return grid_sample(images.movedim(-1, 1).float(), grid, align_corners=True).movedim(1, -1)
