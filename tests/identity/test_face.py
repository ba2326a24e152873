"""Faces: found where they are, cut out as the recogniser was taught, drawn as InstantID draws them."""

import math

import numpy as np
import pytest
import torch
from steer.models.lab.face import LabRecogniser
from steer.models.lab.portrait import Portrait, draw
from steer.nodes.identity.face import Face as Node
from steer.nodes.identity.face import FaceKeypoints
from steer.patches.identity import face as faces
from steer.patches.shared.face import TEMPLATE, Face, align, face_of, similarity, template

POINTS = torch.tensor([[30.0, 40], [70, 44], [52, 60], [34, 80], [66, 82]])


def turned(points, angle, scale, shift):
    c, s = math.cos(angle) * scale, math.sin(angle) * scale
    return points @ torch.tensor([[c, -s], [s, c]]).T + torch.tensor(shift)


@pytest.mark.parametrize("angle, scale, shift", [(0.0, 1.0, (0.0, 0.0)), (0.7, 2.3, (4.0, -9.0)), (-2.0, 0.4, (5, 6))])
def test_the_nearest_similarity_is_found(angle, scale, shift):
    """Exact where there is one; otherwise no other is nearer (Umeyama 1991)."""
    points = turned(template(112), angle, scale, shift)[None]
    m = similarity(points, template(112))
    assert torch.allclose(points @ m[:, :, :2].mT + m[:, None, :, 2], template(112)[None], atol=1e-3)
    m = similarity(POINTS[None], template(112))[0]
    error = ((POINTS @ m[:, :2].T + m[:, 2] - template(112)) ** 2).sum()
    for n in range(4):
        other = m + 1e-3 * torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, -1, 0], [1, 0, 0]], [[0, 0, 9], [0, 0, 0]],
                                         [[0, 0, 0], [0, 0, 9]]][n])
        assert ((POINTS @ other[:, :2].T + other[:, 2] - template(112)) ** 2).sum() > error


def test_templates_are_insightfaces():
    points = torch.tensor(TEMPLATE)
    assert torch.allclose(template(224), 2 * points) and torch.allclose(template(112), points)
    assert torch.allclose(template(256), 2 * points + torch.tensor([16.0, 0]))


def test_a_face_is_cut_out_upright():
    """Pixel for pixel where it is only shifted; black beyond the picture; the points come to lie on the template."""
    picture = torch.rand(1, 160, 150, 3, generator=torch.Generator().manual_seed(1))
    shifted = template(112)[None] + torch.tensor([20.0, 30.0])
    assert torch.allclose(align(picture, shifted, 112), picture[:, 30:142, 20:132], atol=1e-3)
    beyond = align(picture, template(112)[None] + torch.tensor([100.0, 0.0]), 112)
    assert not beyond[:, :, 52:].any() and beyond[:, :, :48].any()
    y, x = torch.meshgrid(torch.arange(300.0), torch.arange(300.0), indexing="ij")
    points = turned(template(112), 0.5, 1.8, (90.0, 30.0))
    for (px, py), (tx, ty) in zip(points.tolist(), template(224).tolist(), strict=True):
        spot = torch.exp(-((x - px) ** 2 + (y - py) ** 2) / 18)[None, ..., None].expand(-1, -1, -1, 3)
        cut = align(spot, points[None], 224)[0, ..., 0]
        row, column = divmod(int(cut.argmax()), 224)
        assert abs(column - tx) <= 1 and abs(row - ty) <= 1


def answer(found, side=640):
    """SCRFD's nine outputs for faces [(stride, place, anchor, score, box, points)], none elsewhere."""
    outputs = [torch.zeros((side // s) ** 2 * 2, width) for width in (1, 4, 10) for s in faces.STRIDES]
    for stride, (x, y), anchor, score, box, points in found:
        n, row = faces.STRIDES.index(stride), ((y * (side // stride) + x) * 2 + anchor)
        centre = torch.tensor([x, y]) * stride
        outputs[n][row] = score
        outputs[n + 3][row] = torch.cat((centre - box[:2], box[2:] - centre)) / stride
        outputs[n + 6][row] = ((points - centre) / stride).flatten()
    return outputs


def test_scrfd_is_decoded():
    small, large = torch.tensor([40.0, 50, 90, 110]), torch.tensor([200.0, 100, 500, 420])
    near = large + 6
    points = torch.rand(3, 5, 2) * 100
    boxes, found = faces.decode(answer([
        (8, (8, 10), 1, 0.8, small, points[0]), (32, (11, 8), 0, 0.9, large, points[1]),
        (16, (22, 16), 1, 0.7, near, points[2]), (16, (3, 3), 0, 0.4, small, points[2]),
    ]), 640)
    assert torch.allclose(boxes, torch.stack((large, small)), atol=1e-3)
    assert torch.allclose(found, points[[1, 0]], atol=1e-3)
    nothing, _ = faces.decode(answer([]), 640)
    assert nothing.shape == (0, 4)


def test_the_detector_sees_the_picture_in_a_corner_of_a_square():
    """And its answer is in pixels of the picture; a smaller square is tried where it finds nothing."""
    asked = []

    class Finder(faces.Recogniser):
        def __init__(self):
            pass

        def detector(self, square):
            asked.append(square)
            side = square.shape[-1]
            box = torch.tensor([8.0, 8, 56, 72])
            return answer([(8, (4, 4), 0, 0.9, box, POINTS)] if side == 320 else [], side)

    picture = torch.ones(400, 800, 3)
    boxes, points = Finder().find(picture)
    assert [s.shape[-1] for s in asked] == [640, 320]
    assert torch.allclose(asked[1][0, 0, :160], torch.tensor(127.5 / 128)) and (asked[1][0, 0, 160:] < -0.99).all()
    assert torch.allclose(boxes, torch.tensor([[20.0, 20, 140, 180]])) and torch.allclose(points, POINTS[None] * 2.5)


def by_hand(points, h, w, thick):
    """InstantID's draw_kps, pixel by pixel: ellipses from point to point at 0.6 of their colour, then discs."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    out = np.zeros((h, w, 3))
    for a, b in [(0, 2), (1, 2), (3, 2), (4, 2)]:
        (x0, y0), (x1, y1) = points[a], points[b]
        angle, half = math.atan2(y1 - y0, x1 - x0), math.hypot(x1 - x0, y1 - y0) / 2
        for y in range(h):
            for x in range(w):
                dx, dy = x - (x0 + x1) / 2, y - (y0 + y1) / 2
                u, v = dx * math.cos(angle) + dy * math.sin(angle), -dx * math.sin(angle) + dy * math.cos(angle)
                if (u / half) ** 2 + (v / (4 * thick)) ** 2 <= 1:
                    out[y, x] = [int(c * 0.6) for c in colors[a]]
    for (px, py), color in zip(points, colors, strict=True):
        for y in range(h):
            for x in range(w):
                if math.hypot(x - px, y - py) <= 10 * thick:
                    out[y, x] = color
    return torch.from_numpy(out / 255).float()[None]


def test_keypoints_are_drawn_as_instantid_draws_them():
    hand = by_hand(POINTS.tolist(), 100, 110, 0.5)
    assert (faces.draw(POINTS[None], (100, 110), 0.5) - hand).abs().gt(1e-3).any(-1).float().mean() < 1e-3
    face = Face(torch.ones(1, 512), POINTS[None], torch.ones(1, 100, 110, 3))
    (same,) = FaceKeypoints.execute(0, 0, 0.5, face).args
    (twice,) = FaceKeypoints.execute(220, 200, 1.0, face).args
    assert same.shape == (1, 100, 110, 3) and twice.shape == (1, 200, 220, 3)
    assert (twice[:, ::2, ::2] - same).abs().gt(1e-3).any(-1).float().mean() < 0.01
    (auto,) = FaceKeypoints.execute(1024, 1024, 0.0, face).args
    assert torch.equal(auto, FaceKeypoints.execute(1024, 1024, 1.0, face).args[0])


def test_landmarks_of_the_host():
    """MediaPipe names eyes from the person's side; the picture's left comes first."""
    landmarks = np.zeros((478, 2), np.float32)
    landmarks[list(faces.MEDIAPIPE)] = POINTS.numpy()[[1, 0, 2, 4, 3]]
    value = {"frames": [[{"landmarks_xy": landmarks}], []], "image_size": (100, 110)}
    (picture,) = FaceKeypoints.execute(0, 0, 0.5, landmarks=value).args
    assert torch.equal(picture, torch.cat((faces.draw(POINTS[None], (100, 110), 0.5), torch.zeros(1, 100, 110, 3))))


def test_the_lab_knows_its_faces():
    """Points within 2 pixels of where the renderer puts them; one person under other attributes is one face."""
    finder, errors, same, other = LabRecogniser(), [], [], []
    for seed in range(9100, 9124):
        p = Portrait.from_seed(seed)
        q = Portrait.from_seed(seed + 500).with_identity(p)
        pictures = torch.stack([torch.from_numpy(draw(each).copy()).float() / 255 for each in (p, q)])
        x = 64 + {"left": -15, "center": 0, "right": 15}[p.position]
        truth = torch.tensor([[x - 14 - 3 * p.eye_spacing, 65], [x + 14 + 3 * p.eye_spacing, 65],
                              [x, 77 + 4.5 * p.nose_length]])
        errors.append((finder.find(pictures[0])[1][0, :3] - truth).norm(dim=1).max())
        both = finder.embed(pictures, None)
        same.append(both[0] @ both[1])
        other.append(both)
    other = torch.stack(other)[:, 0]
    assert float(torch.stack(errors).median()) < 2
    assert float(torch.stack(same).mean()) > float((other[:-1] * other[1:]).sum(1).mean()) + 0.5


def test_the_node(tmp_path):
    picture = torch.from_numpy(draw(Portrait.from_seed(9100)).copy()).float()[None] / 255
    face, crop, mask = Node.execute(picture, "lab", 0, 0.5).args
    assert face.embedding.shape == (1, 512) and face_of(face) is face
    assert crop.shape == (1, 224, 224, 3) and 0.2 < float(mask.mean()) < 0.5
    with pytest.raises(ValueError, match="SteerFace: there are 1 faces in picture 0, and number 1 was asked for"):
        Node.execute(picture, "lab", 1, 0.5)
    assert Node.validate_inputs("nobody") is not True and Node.validate_inputs("lab") is True
    raw = face_of(torch.ones(512))
    assert raw.embedding.shape == (1, 512) and torch.allclose(raw.identity.norm(), torch.tensor(1.0))


def test_bad_input(tmp_path):
    (tmp_path / "genderage.onnx").touch()
    empty = {"frames": [[]], "image_size": (8, 8)}
    for run, words in (
        (lambda: faces.Recogniser(tmp_path), r"no file det_\*.onnx or scrfd_\*.onnx in .*; it has genderage.onnx"),
        (lambda: FaceKeypoints.execute(0, 0, 0.0), "SteerFaceKeypoints: needs one of face and landmarks"),
        (lambda: FaceKeypoints.execute(0, 0, 0.0, face_of(torch.ones(512))), "the face has no keypoints"),
        (lambda: FaceKeypoints.execute(0, 0, 0.0, landmarks=empty), "the landmarks hold no face"),
        (lambda: face_of(torch.ones(2, 2, 2)), "face is Tensor; wire SteerFace"),
    ):
        with pytest.raises(ValueError, match=words):
            run()
