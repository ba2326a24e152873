"""The real ComfyUI that the tests and the headless runner work in.

    python tests/host.py --path         prints its folder
    python tests/host.py --python       prints its interpreter
    python tests/host.py --serve PORT   starts its server with this pack loaded

It is the one named by COMFYUI_PATH, else the one whose custom_nodes folder holds this repository, else one that is
installed under .steer/ in this repository. STEER_HOST_VERSION picks the version to install.
"""

import argparse
import asyncio
import atexit
import functools
import importlib.util
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import host_imports
import host_setup

ROOT = Path(__file__).absolute().parents[1]
HOME = ROOT / ".steer"


@dataclass(frozen=True)
class Host:
    path: Path
    python: Path
    version: str


@dataclass(frozen=True)
class Result:
    """What a run left behind: `outputs[node id]` is the tuple of a node's outputs, `ui[node id]` what it shows."""

    outputs: dict
    ui: dict

    def __getitem__(self, node_id):
        return self.outputs[str(node_id)]


class PromptError(RuntimeError):
    """The host refused a prompt or failed while running it. `faults` is a list of (node id, input or None, text)."""

    def __init__(self, faults):
        self.faults = faults
        super().__init__("\n".join(text for _, _, text in faults))


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

    scratch = tempfile.mkdtemp(prefix="steer-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    for kind in ("output", "temp", "user"):
        folder = os.path.join(scratch, kind)
        os.makedirs(folder)
        getattr(folder_paths, f"set_{kind}_directory")(folder)
    return host


def has_accelerator(torch):
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


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


def executor():
    """A PromptExecutor as the server makes it. One per run unless the cache between runs is wanted."""
    import execution
    import server

    return execution.PromptExecutor(server.PromptServer.instance, cache_type=execution.CacheType.CLASSIC,
                                    cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})


def execute(prompt, extra_data=None, runner=None):
    """Runs an API prompt through the host's validation and executor. Raises PromptError, else returns a Result.

    The host runs nothing that leads to no output node; a prompt without one gets a PreviewAny on every leaf.
    """
    import execution

    prompt, prompt_id = with_output(prompt), str(uuid.uuid4())
    valid, error, targets, node_errors = asyncio.run(execution.validate_prompt(prompt_id, prompt, None))
    if node_errors or not valid:
        raise PromptError(faults_of(prompt, node_errors, error))
    runner = runner or executor()
    runner.execute(prompt, prompt_id, extra_data or {}, targets)
    if not runner.success:
        raise PromptError(faults_of_run(prompt, runner.status_messages))
    return Result(asyncio.run(cached_outputs(runner, prompt)), runner.history_result["outputs"])


def with_output(prompt):
    import nodes

    kinds = [nodes.NODE_CLASS_MAPPINGS.get(node.get("class_type")) for node in prompt.values()]
    if any(kind is None or getattr(kind, "OUTPUT_NODE", False) for kind in kinds):
        return prompt
    used = {value[0] for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)}
    leaves = [key for key in prompt if key not in used]
    previews = {f"preview-{key}": {"class_type": "PreviewAny", "inputs": {"source": [key, 0]}} for key in leaves}
    return {**prompt, **previews}


async def cached_outputs(runner, prompt):
    """The executor keeps every node's outputs, per output a list of values: one value unless the output is a list."""
    outputs = {}
    for node_id in prompt:
        entry = await runner.caches.outputs.get(node_id)
        if entry is not None:
            outputs[node_id] = tuple(slot[0] if len(slot) == 1 else slot for slot in entry.outputs)
    return outputs


def node_label(prompt, node_id):
    node = prompt.get(node_id, {})
    title = node.get("_meta", {}).get("title")
    kind = node.get("class_type", "unknown type")
    return f'node {node_id} "{title}" ({kind})' if title and title != kind else f"node {node_id} ({kind})"


def faults_of(prompt, node_errors, error=None):
    """The host's validation report as (node id, input, sentence) triples."""
    faults = []
    for node_id, report in node_errors.items():
        for e in report["errors"]:
            name = e.get("extra_info", {}).get("input_name")
            where = node_label(prompt, node_id) + (f", input {name!r}" if name else "")
            details = f": {e['details']}" if e.get("details") else ""
            faults.append((node_id, name, f"{where}: {e['message']}{details}"))
    if not faults:
        info = error.get("extra_info", {})
        where = f"{node_label(prompt, info['node_id'])}: " if info.get("node_id") in prompt else ""
        faults.append((info.get("node_id"), None, f"{where}{error['message']} {error['details']}".strip()))
    return faults


def faults_of_run(prompt, messages):
    faults = []
    for event, data in messages:
        if event == "execution_error":
            node_id = data["node_id"]
            text = f"{node_label(prompt, node_id)}: {data['exception_type']}: {data['exception_message'].strip()}"
            faults.append((node_id, None, text))
        elif event == "execution_interrupted":
            faults.append((data["node_id"], None, f"{node_label(prompt, data['node_id'])}: interrupted"))
    return faults


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
    config.write_text(f"steer:\n  custom_nodes: {str(ROOT.parent)!r}\n", encoding="utf-8")
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
    what.add_argument("--serve", metavar="PORT", type=int, help="start the server with the pack; files in .steer/serve")
    options = parser.parse_args()
    if options.serve is None:
        host = setup()
        print(host.path if options.path else host.python)
        return
    run_main(enter(), main_arguments(options.serve, HOME / "serve"))


if __name__ == "__main__":
    main()
