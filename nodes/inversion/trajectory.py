import hashlib
import os
from pathlib import Path

from comfy_api.latest import io

from ...patches.inversion import trajectory as files
from .. import inputs

OUTPUT = " [output]"  # as the host marks files of its output folder


class SaveTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerSaveTrajectory",
            display_name="Save Trajectory",
            category="steer/inversion",
            description="Writes an inverted picture with all that is needed to edit it later: the latent at every "
            "step, the sigmas, the prompt, and what tells its model. A safetensors file in the output folder.",
            search_aliases=["save inversion", "export trajectory", "store latents", "write trajectory"],
            is_output_node=True,
            inputs=[
                io.Custom("STEER_TRAJECTORY").Input("trajectory", tooltip="From SteerInvert."),
                io.String.Input(
                    "filename_prefix",
                    default="trajectories/Steer",
                    tooltip="Begin of the file's name, with subfolders of the output folder. A number follows, higher "
                    "than those that are there.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="file", tooltip="The file's name, for Load Trajectory's file in the same workflow."
                )
            ],
        )

    @classmethod
    def execute(cls, trajectory, filename_prefix) -> io.NodeOutput:
        import folder_paths

        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_{files.SUFFIX}"
        files.save(trajectory, os.path.join(folder, file))
        where = os.path.join(subfolder, file).replace(os.sep, "/")
        saved = {"filename": file, "subfolder": subfolder, "type": "output"}
        return io.NodeOutput(where + OUTPUT, ui={"text": [where], "trajectories": [saved]})


class LoadTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerLoadTrajectory",
            display_name="Load Trajectory",
            category="steer/inversion",
            description="Reads a file that Save Trajectory wrote, so that a picture is inverted once and edited often. "
            "Wire it to editing nodes, and through Trajectory Parts to the sampler.",
            search_aliases=["load inversion", "import trajectory", "open trajectory", "read trajectory"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_found(),
                    tooltip=f"Files *{files.SUFFIX} in the input folder, and in the output folder, marked so.",
                )
            ],
            outputs=[
                io.Custom("STEER_TRAJECTORY").Output(
                    display_name="trajectory", tooltip="The same, bit for bit, as was saved."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        if file is None or _path(file) is not None:  # wired: it is there only when the run comes to it
            return True
        return f"there is no trajectory {file!r} in the input or output folder"

    @classmethod
    def fingerprint_inputs(cls, file=None):
        path = None if file is None else _path(file)
        return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        path = _path(file)
        if path is None:
            raise ValueError(f"SteerLoadTrajectory: there is no trajectory {file!r} in the input or output folder.")
        return io.NodeOutput(files.load(path))


class TrajectoryParts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SteerTrajectoryParts",
            display_name="Trajectory Parts",
            category="steer/inversion",
            description="All that SamplerCustomAdvanced needs to draw or edit the picture of a trajectory again: its "
            "latent, noise, sigmas and prompt. For trajectories from a file.",
            search_aliases=["trajectory to noise", "resume inversion", "unpack trajectory", "trajectory to latent"],
            inputs=[
                io.Model.Input("model", tooltip="The model with which the picture was inverted, LoRAs or not."),
                inputs.trajectory(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The picture, for the sampler's latent."),
                io.Noise.Output(
                    display_name="noise",
                    tooltip="From which the model draws this picture, beside its latent and with all of the sigmas.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule it was inverted with, for the sampler."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt it was inverted with."),
            ],
        )

    @classmethod
    def execute(cls, model, trajectory) -> io.NodeOutput:
        source, noise, sigmas, positive = files.parts(model, trajectory)
        return io.NodeOutput({"samples": source}, noise, sigmas, positive)


def _folders():
    """The folders where trajectories may lie, by the mark behind a file's name."""
    import folder_paths

    return {"": folder_paths.get_input_directory(), OUTPUT: folder_paths.get_output_directory()}


def _found():
    names = []
    for mark, folder in _folders().items():
        for at, _, found in os.walk(folder):
            below = os.path.relpath(at, folder).replace(os.sep, "/") + "/"
            names += [below.removeprefix("./") + name + mark for name in found if name.endswith(files.SUFFIX)]
    return sorted(names)


def _path(file):
    """Where the file lies; None where it is none, or outside of those folders."""
    mark = OUTPUT if file.endswith(OUTPUT) else ""
    folder = Path(_folders()[mark]).resolve()
    path = (folder / file.removesuffix(mark)).resolve()
    return path if path.is_relative_to(folder) and path.name.endswith(files.SUFFIX) and path.is_file() else None


NODES = [SaveTrajectory, LoadTrajectory, TrajectoryParts]
