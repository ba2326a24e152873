"""Where adapter files lie: the folders of this pack and of others, and the lab's own."""

import os
from pathlib import Path

# the first is ours, the others are where other packs keep files of this kind
FOLDERS = (
    "ipadapter", "instantid", "pulid", "photomaker", "infinite_you", "ipadapter-flux", "xlabs/ipadapters",
)
EVA_CLIP = ("clip_vision", "text_encoders", "eva_clip")
FACES = "insightface"
TIMES = ("time_predictors",)
SUFFIXES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")
LAB = Path(__file__).parents[1] / "models" / "lab" / "weights"
LAB_MARK, PREFIX = " [lab]", "adapter"  # the lab's files are named adapter*.safetensors
LAB_EYES = f"vision.safetensors{LAB_MARK}"


def register():
    """Makes models/ipadapter known to the host, so that extra_model_paths.yaml can name others."""
    import folder_paths

    folder_paths.add_model_folder_path(FOLDERS[0], os.path.join(folder_paths.models_dir, FOLDERS[0]))


def found():
    """Names of all files, those of folders other than ipadapter marked so: "a.bin", "b.bin [pulid]", "c [lab]"."""
    return _names(FOLDERS) + [path.name + LAB_MARK for path in sorted(LAB.glob(f"{PREFIX}*.safetensors"))]


def eva_clips():
    """Names of files that may be EVA-CLIP: all of models/clip_vision, of the other folders those that say so; and what
    the lab has in its place."""
    return [name for name in _names(EVA_CLIP) if not name.endswith("]") or "eva" in name.lower()] + [LAB_EYES]


def time_predictors():
    """Names of the files in models/time_predictors, and of the lab's."""
    names = [name for name in _names(TIMES) if name.lower().endswith(".safetensors")]
    return names + [path.name + LAB_MARK for path in sorted(LAB.glob("time*.safetensors"))]


def path_of(file, folders=FOLDERS):
    """Where a file lies that `found` names, or others for their folders: EVA_CLIP, TIMES; None where there is none."""
    if file.endswith(LAB_MARK):
        roots, name = [LAB], file.removesuffix(LAB_MARK)
    else:
        folder = next((f for f in folders if file.endswith(f" [{f}]")), folders[0])
        roots, name = _roots(folder), file.removesuffix(f" [{folder}]")
    for root in roots:
        root = Path(root).resolve()
        path = Path(os.path.abspath(root / name))  # links are followed, as the host does
        if path.is_relative_to(root) and path.suffix.lower() in SUFFIXES and path.is_file():
            return path
    return None


def encoders():
    """Paths of the safetensors files in models/clip_vision."""
    import folder_paths

    names = folder_paths.get_filename_list("clip_vision")
    return [folder_paths.get_full_path_or_raise("clip_vision", n) for n in names if n.lower().endswith(".safetensors")]


def recognisers():
    """{name: folder} of the folders below models/insightface that hold ONNX files."""
    found = {}
    for root in _roots(FACES):
        for at, _, names in os.walk(root, followlinks=True):
            if any(name.lower().endswith(".onnx") for name in names):
                found.setdefault(os.path.relpath(at, root).replace(os.sep, "/").removeprefix("models/"), at)
    return found


def _roots(folder):
    import folder_paths

    known = folder_paths.get_folder_paths(folder) if folder in folder_paths.folder_names_and_paths else []
    return list(dict.fromkeys((*known, os.path.join(folder_paths.models_dir, *folder.split("/")))))


def _names(folders):
    names = []
    for folder in folders:
        mark = "" if folder == folders[0] else f" [{folder}]"
        names += sorted({name + mark for root in _roots(folder) for name in _below(root)})
    return names


def _below(root):
    for at, _, names in os.walk(root, followlinks=True):
        below = os.path.relpath(at, root).replace(os.sep, "/") + "/"
        yield from (below.removeprefix("./") + name for name in names if name.lower().endswith(SUFFIXES))
