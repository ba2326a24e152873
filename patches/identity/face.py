"""Faces of pictures: found by SCRFD (Guo et al. 2021, arXiv 2105.04714), told apart by ArcFace (Deng et al. 2019, arXiv
1801.07698), both as the ONNX files of insightface; and drawn as the five points that InstantID's ControlNet reads."""

import os

import torch
from torch.nn.functional import interpolate, pad

from ..shared.face import ALIGNED, Face, align

DETECTORS, RECOGNISERS = ("det_", "scrfd_"), ("glintr100", "w600k_", "ms1mv")  # beginnings of file names
STRIDES, ANCHORS = (8, 16, 32), 2  # of SCRFD's grids; boxes at each place of them
SIDES = (640, 320, 160)  # what the detector sees: smaller ones find faces that fill the picture
OVERLAP = 0.4  # of two boxes that are one face
LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))  # from the nose; InstantID, `draw_kps`
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
WIDTH, RADIUS, DIM = 4, 10, 0.6  # of a limb, half of it; of a point; of what limbs keep of their colour
MEDIAPIPE = (468, 473, 1, 61, 291)  # the five points among the 478 of MediaPipe: irises, tip of the nose, mouth


def decode(outputs, side, threshold=0.5):
    """SCRFD's answer for a square of `side` -> boxes [k, 4] (x, y, x, y), keypoints [k, 5, 2], largest face first.

    outputs: scores [P, 1], then boxes [P, 4], then keypoints [P, 10], each for the three strides; P places times
        ANCHORS. Boxes are distances from the place to its sides, keypoints from it to them, in strides.
    """
    boxes, points, scores = [], [], []
    for n, stride in enumerate(STRIDES):
        score, distance, key = (outputs[n + 3 * i].flatten(0, -2) for i in range(3))
        y, x = torch.meshgrid(*(torch.arange(side // stride, dtype=torch.float32),) * 2, indexing="ij")
        centre = (torch.stack((x, y), -1) * stride).reshape(-1, 2).repeat_interleave(ANCHORS, 0)
        found = score[:, 0] >= threshold
        centre, distance = centre[found], distance[found] * stride
        boxes.append(torch.cat((centre - distance[:, :2], centre + distance[:, 2:]), 1))
        points.append(centre[:, None] + key[found].unflatten(1, (5, 2)) * stride)
        scores.append(score[found, 0])
    boxes, points = torch.cat(boxes), torch.cat(points)
    kept = torch.tensor(distinct(boxes, torch.cat(scores)), dtype=torch.long)
    boxes, points = boxes[kept], points[kept]
    order = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argsort(descending=True)
    return boxes[order], points[order]


def distinct(boxes, scores):
    """Numbers of boxes [k, 4] that are faces of their own, the surest first."""
    kept, rest = [], scores.argsort(descending=True).tolist()
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    while rest:
        first, *rest = rest
        kept.append(first)
        low, high = torch.maximum(boxes[first, :2], boxes[rest, :2]), torch.minimum(boxes[first, 2:], boxes[rest, 2:])
        common = (high - low).clamp(min=0).prod(1)
        share = common / (areas[first] + areas[rest] - common).clamp(min=1e-9)
        rest = [n for n, s in zip(rest, share.tolist(), strict=True) if s <= OVERLAP]
    return kept


class Recogniser:
    """Detector and recogniser of a folder with insightface's ONNX files, through onnxruntime.

    detector, recogniser: [1, 3, h, w] -> list of tensors.
    """

    def __init__(self, folder):
        self.detector, self.recogniser = (_session(folder, names) for names in (DETECTORS, RECOGNISERS))

    def find(self, image, threshold=0.5):
        """(boxes [k, 4], keypoints [k, 5, 2]) in an image [h, w, 3] in 0..1."""
        h, w = image.shape[:2]
        for side in SIDES:
            scale = side / max(h, w)
            size = max(int(h * scale), 1), max(int(w * scale), 1)
            small = interpolate(image.movedim(-1, 0)[None].float(), size, mode="bilinear", antialias=scale < 1)
            square = pad(small * 255, (0, side - size[1], 0, side - size[0]))
            boxes, points = decode(self.detector((square - 127.5) / 128), side, threshold)
            if len(boxes):
                shrunk = torch.tensor([size[1] / w, size[0] / h])
                return boxes / shrunk.repeat(2), points / shrunk
        return boxes, points

    def embed(self, images, keypoints):
        """Embeddings [n, 512] of the faces in images [n, h, w, 3], as they are."""
        faces = align(images, keypoints, ALIGNED).movedim(-1, 1) * 2 - 1
        return torch.cat([self.recogniser(face[None])[0] for face in faces])


def faces_of(images, recogniser, number=0, threshold=0.5):
    """(Face, boxes [n, 4]) of images [n, h, w, 3]: the face `number` of each, by size; ValueError where it has none."""
    boxes, points = [], []
    for n, image in enumerate(images):
        box, at = recogniser.find(image, threshold)
        if len(box) <= number:
            raise ValueError(
                f"there are {len(box)} faces in picture {n}, and number {number} was asked for (the largest is 0); "
                "give it a larger face, or lower the threshold."
            )
        boxes.append(box[number])
        points.append(at[number])
    points = torch.stack(points)
    return Face(recogniser.embed(images, points), points, images), torch.stack(boxes)


def draw(keypoints, size, thickness=0.0):
    """The five points of the faces [k, 5, 2] of one picture on black, [1, h, w, 3] in 0..1, as InstantID's ControlNet
    was shown them.

    size: (h, w) of the picture.  thickness: 1 is InstantID's, for pictures of 1024 pixels; 0 goes by the size.
    """
    h, w = size
    thickness = thickness or max(size) / 1024
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    picture = torch.zeros(h, w, 3)
    colors = torch.tensor(COLORS, dtype=torch.float32)
    for face in keypoints:
        for a, b in LIMBS:
            (x0, y0), (x1, y1) = face[a].tolist(), face[b].tolist()
            length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-6)
            cos, sin = (x1 - x0) / length, (y1 - y0) / length
            dx, dy = x - (x0 + x1) / 2, y - (y0 + y1) / 2
            along, across = dx * cos + dy * sin, dy * cos - dx * sin
            inside = (along / (length / 2)) ** 2 + (across / (WIDTH * thickness)) ** 2 <= 1
            picture[inside] = (colors[a] * DIM).floor()
        for (px, py), color in zip(face.tolist(), colors, strict=True):
            picture[(x - px) ** 2 + (y - py) ** 2 <= (RADIUS * thickness) ** 2] = color
    return picture[None] / 255


def drawn(face=None, landmarks=None, width=0, height=0, thickness=0.0):
    """One picture [n, h, w, 3] for each of a `Face`, or each frame of the host's FACE_LANDMARKS; of another size than
    theirs where width or height is not 0."""
    if (face is None) == (landmarks is None):
        raise ValueError("needs one of face and landmarks; wire SteerFace, or MediaPipe's face landmarks.")
    if landmarks is not None:
        (h, w), found = landmarks["image_size"], [_points(frame) for frame in landmarks["frames"]]
        if not any(len(points) for points in found):
            raise ValueError("the landmarks hold no face; give the landmarker a picture with one.")
    elif getattr(face, "keypoints", None) is None:
        raise ValueError("the face has no keypoints; take one that SteerFace found in a picture.")
    else:
        (h, w), found = face.image.shape[1:3], face.keypoints[:, None]
    size = height or h, width or w
    scale = torch.tensor([size[1] / w, size[0] / h])
    return torch.cat([draw(points * scale, size, thickness) for points in found])


def _points(frame):
    """[k, 5, 2] of the faces of a frame; MediaPipe's left is the person's, ours the picture's."""
    points = torch.zeros(len(frame), 5, 2)
    for n, face in enumerate(frame):
        points[n] = torch.as_tensor(face["landmarks_xy"])[list(MEDIAPIPE)]
        if points[n, 0, 0] > points[n, 1, 0]:
            points[n] = points[n][[1, 0, 2, 4, 3]]
    return points


def _session(folder, names):
    files = sorted(f for f in os.listdir(folder) if f.lower().endswith(".onnx"))
    chosen = next((f for f in files if f.lower().startswith(names)), None)
    if chosen is None:
        raise ValueError(
            f"there is no file {' or '.join(f'{name}*.onnx' for name in names)} in {os.path.basename(folder)}; it has "
            f"{', '.join(files) or 'no ONNX file'}. Unpack insightface's buffalo_l or antelopev2 there."
        )
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            f"needs the package onnxruntime to read {chosen}: pip install onnxruntime (or onnxruntime-gpu)."
        ) from None
    providers = [p for p in onnxruntime.get_available_providers() if p != "TensorrtExecutionProvider"]
    session = onnxruntime.InferenceSession(os.path.join(folder, chosen), providers=providers)
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.float().cpu().numpy()})]
