from comfy_api.latest import io

from ...patches.identity import face as faces
from ...patches.shared.steering import blame
from .. import adapters

LAB = "lab"


class Face(io.ComfyNode):
    node = "SteerFace"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=cls.node,
            display_name="Face",
            category="steer/identity",
            description="Finds the face in a picture and says who it is, for nodes that draw a face again. Reads the "
            "ONNX files of insightface through onnxruntime; the package insightface is not needed. These files may be "
            "used for research, not commercially.",
            search_aliases=[
                "face embedding", "insightface", "face analysis", "ArcFace", "antelopev2", "buffalo_l", "face crop",
                "face detection", "SCRFD",
            ],
            inputs=[
                io.Image.Input("image", tooltip="Pictures with the face; each of a batch gives one."),
                io.Combo.Input(
                    "recogniser",
                    options=[*adapters.recognisers(), LAB],
                    tooltip="A folder below models/insightface with a detector and a recogniser: buffalo_l for FaceID, "
                    "antelopev2 for InstantID, PuLID and Kolors. lab is for portraits of Lab Portrait alone.",
                ),
                io.Int.Input(
                    "number",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Which face, where there are several: 0 is the largest, higher ones are smaller.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.05,
                    max=0.99,
                    step=0.01,
                    tooltip="How sure it must be that there is a face. Lower finds more, and things that are none.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Custom("STEER_FACE").Output(display_name="face", tooltip="Who it is and where, for face nodes."),
                io.Image.Output(display_name="crop", tooltip="The face upright, 224 x 224."),
                io.Mask.Output(display_name="mask", tooltip="The box around the face."),
            ],
        )

    @classmethod
    def validate_inputs(cls, recogniser=None):
        known = [*adapters.recognisers(), LAB]
        if recogniser is None or recogniser in known:
            return True
        return f"there is no recogniser {recogniser!r}; put insightface's ONNX files below models/insightface"

    @classmethod
    def execute(cls, image, recogniser, number, threshold) -> io.NodeOutput:
        import torch

        with blame(cls):
            if recogniser == LAB:
                from ...models.lab.face import LabRecogniser

                finder = LabRecogniser()
            else:
                finder = faces.Recogniser(adapters.recognisers()[recogniser])
            face, boxes = faces.faces_of(image[..., :3], finder, number, threshold)
            mask = torch.zeros(image.shape[:3])
            for m, (x0, y0, x1, y1) in zip(mask, boxes.round().int().clamp(min=0).tolist(), strict=True):
                m[y0:y1, x0:x1] = 1.0
            return io.NodeOutput(face, face.crop(224), mask)


class FaceKeypoints(io.ComfyNode):
    node = "SteerFaceKeypoints"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=cls.node,
            display_name="Face Keypoints",
            category="steer/identity",
            description="Draws eyes, nose and mouth of faces as coloured points and lines on black: the picture that "
            "InstantID's ControlNet was trained with, and which says where the new face shall be.",
            search_aliases=["InstantID keypoints", "kps image", "face pose", "facial landmarks", "draw keypoints"],
            inputs=[
                io.Custom("STEER_FACE").Input("face", optional=True, tooltip="From SteerFace."),
                io.Custom("FACE_LANDMARKS").Input(
                    "landmarks", optional=True, tooltip="From MediaPipe Face Landmarker, in place of a face."
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=16384, tooltip="Of the picture to draw; 0 is that of the face's."
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=16384, tooltip="Of the picture to draw; 0 is that of the face's."
                ),
                io.Float.Input(
                    "thickness",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Of lines and points: higher is bolder. 1 is InstantID's, meant for 1024 pixels; 0 goes by "
                    "the size of the picture.",
                    advanced=True,
                ),
            ],
            outputs=[io.Image.Output(tooltip="One for each picture; for the ControlNet of InstantID.")],
        )

    @classmethod
    def execute(cls, width, height, thickness, face=None, landmarks=None) -> io.NodeOutput:
        with blame(cls):
            return io.NodeOutput(faces.drawn(face, landmarks, width, height, thickness))


NODES = [Face, FaceKeypoints]
