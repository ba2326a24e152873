"""The real ComfyUI that the tests and the headless runner work in.

    python tests/host.py --path         prints its folder
    python tests/host.py --python       prints its interpreter
    python tests/host.py --serve PORT   starts its server with this pack loaded

It is the one named by COMFYUI_PATH, else the one whose custom_nodes folder holds this repository, else one that is
installed under .steer/ in this repository. STEER_HOST_VERSION asks for an installed one of that version.
"""

import argparse
import asyncio
import atexit
import functools
import importlib.util
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import host_imports
import host_setup
from host_run import PromptError, Result, definition, execute, executor, run

__all__ = ["Host", "PromptError", "Result", "boot", "definition", "enter", "execute", "executor", "load_pack", "run",
           "setup"]

ROOT = Path(__file__).absolute().parents[1]
HOME = ROOT / ".steer"


@dataclass(frozen=True)
class Host:
    path: Path
    python: Path
    version: str


# --- finding it ---------------------------------------------------------------------------------------------------


def setup():
    """Finds or installs the host. Fast when there is nothing to do."""
    path = found()
    if path is None:
        path, python = host_setup.install(os.environ.get("STEER_HOST_VERSION", host_setup.DEFAULT_VERSION), HOME)
    else:
        python = interpreter_for(path)
    version = re.search(r'__version__ = "(.+)"', (path / "comfyui_version.py").read_text())
    return Host(path, python, version.group(1))


def found():
    """A ComfyUI that is already there, or None."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().absolute()
        if not is_comfyui(path):
            raise SystemExit(f"COMFYUI_PATH is {named}, but there is no ComfyUI (main.py, comfy/, nodes.py) in it.")
        return path
    if "STEER_HOST_VERSION" in os.environ:
        return None
    for root in (ROOT, ROOT.resolve()):  # custom_nodes often holds a link to the repository
        if root.parent.name == "custom_nodes" and is_comfyui(root.parents[1]):
            return root.parents[1]
    return None


def is_comfyui(path):
    return (path / "main.py").is_file() and (path / "nodes.py").is_file() and (path / "comfy").is_dir()


def interpreter_for(path):
    """The interpreter that a user of this ComfyUI starts it with, as far as one can tell."""
    candidates = [host_setup.python_of(path / venv) for venv in ("venv", ".venv")]
    candidates.append(path.parent / "python_embeded" / "python.exe")  # the portable Windows package, its spelling
    for python in candidates:
        if python.exists():
            return python
    if importlib.util.find_spec("torch"):
        return Path(sys.executable)
    return host_setup.install(host_setup.DEFAULT_VERSION, HOME)[1]


def inside(host):
    """Whether this process runs in the host's environment. The folder tells: `python` and `python3` are one."""
    here, there = (os.path.normcase(os.path.abspath(p)) for p in (sys.executable, host.python))
    return os.path.dirname(here) == os.path.dirname(there)


def enter():
    """Called first in a script: sets the host up and, outside its interpreter, runs the script again inside."""
    host = setup()
    if inside(host):
        return host
    command = [str(host.python), *sys.orig_argv[1:]]
    sys.stdout.flush()
    if os.name == "nt":  # there, exec gives the console back before the new process has ended
        raise SystemExit(subprocess.run(command).returncode)
    os.execv(command[0], command)


# --- the host in this process -------------------------------------------------------------------------------------


@functools.cache
def boot():
    """Makes the host's modules importable. Files it writes go to a folder that is removed at exit."""
    host = setup()
    if not inside(host):
        raise RuntimeError(f"The host runs in {host.python}, this is {sys.executable}. Call host.enter() first, "
                           "or start the tests with `python tests/run.py`.")
    sys.path.insert(0, str(host.path))  # before anything else: this repository has a package `nodes` too
    host_imports.stand_in_for_missing()

    import torch
    from comfy.cli_args import args

    if not has_accelerator(torch):
        args.cpu = True
    import folder_paths
    import utils.extra_config  # noqa: F401 - before nodes, as in main.py: older ones put comfy/, with a utils.py, first

    scratch = tempfile.mkdtemp(prefix="steer-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    for kind in ("output", "temp", "user"):
        folder = os.path.join(scratch, kind)
        os.makedirs(folder)
        getattr(folder_paths, f"set_{kind}_directory")(folder)
    return host


def has_accelerator(torch):
    xpu = getattr(torch, "xpu", None)  # not in every torch that a user may have
    return torch.cuda.is_available() or torch.backends.mps.is_available() or bool(xpu and xpu.is_available())


@functools.cache
def load_pack():
    """Loads this repository the way the host loads any pack, and makes its modules importable as `steer`."""
    boot()
    import server

    import nodes

    server.PromptServer(asyncio.new_event_loop())  # never listens; nodes and the executor expect it to exist
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    loaded = asyncio.run(nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
    name = str(ROOT).replace(".", "_x_")  # the host's rule
    if not loaded:
        logging.getLogger().error("The host could not load the pack. The same again, with its traceback:")
        asyncio.run(reload(sys.modules[name]))
        raise RuntimeError("The host could not load the pack; its log says why.")
    sys.meta_path.insert(0, host_imports.Alias("steer", name))
    return sys.modules[name]


async def reload(pack):
    """What the host did inside its try, so that the exception it swallowed comes out whole."""
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()


# --- the host as a server -----------------------------------------------------------------------------------------


def main_arguments(port, scratch):
    """Arguments of the host's main.py that load this pack alone and keep its files apart from a user's.

    The parent folder of this repository becomes a place for custom nodes, of which only this one is let in: unlike
    a link in custom_nodes that needs no rights on any system.
    """
    scratch = Path(scratch)
    for kind in ("output", "input", "user"):
        (scratch / kind).mkdir(parents=True, exist_ok=True)
    config = scratch / "paths.yaml"
    config.write_text(f"steer:\n  custom_nodes: {json.dumps(str(ROOT.parent))}\n", encoding="utf-8")
    arguments = ["--port", str(port), "--extra-model-paths-config", str(config),
                 "--disable-all-custom-nodes", "--whitelist-custom-nodes", ROOT.name, "--disable-api-nodes",
                 "--database-url", "sqlite:///:memory:", "--temp-directory", str(scratch)]
    for kind in ("output", "input", "user"):
        arguments += [f"--{kind}-directory", str(scratch / kind)]
    return arguments


def run_main(host, arguments):
    """The host's main.py in this process, with stand-ins where a companion of torch is missing."""
    sys.path.insert(0, str(host.path))
    host_imports.stand_in_for_missing()
    import torch

    if not has_accelerator(torch):
        arguments = [*arguments, "--cpu"]
    sys.argv = [str(host.path / "main.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--path", action="store_true", help="print the folder of ComfyUI")
    what.add_argument("--python", action="store_true", help="print its interpreter")
    what.add_argument("--serve", metavar="PORT", type=int, help="start the server with this pack and no other")
    parser.add_argument("--files", metavar="DIR", type=Path, default=HOME / "serve",
                        help="where the server keeps its user, input, output and temp folders (%(default)s)")
    options = parser.parse_args()
    if options.serve is None:
        host = setup()
        print(host.path if options.path else host.python)
        return
    run_main(enter(), main_arguments(options.serve, options.files.absolute()))


if __name__ == "__main__":
    main()
