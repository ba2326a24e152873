"""Runs every test in a real ComfyUI, which is set up first where there is none.

    python tests/run.py                      all tests, side by side on up to four cores
    python tests/run.py tests/guidance -x    what follows goes to pytest
    python tests/run.py --host all           on every supported ComfyUI version, one after the other

Exits with pytest's code: 0 all passed, 1 some failed, others are errors of the run itself.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import host
import host_setup


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--host", choices=[*host_setup.SDISTS, "all"], help="ComfyUI version to install and test on")
    options, for_pytest = parser.parse_known_args()
    if options.host:
        return on_versions(host_setup.SDISTS if options.host == "all" else [options.host], for_pytest)
    here = host.enter()
    print(f"ComfyUI {here.version} in {here.path}", flush=True)
    if importlib.util.find_spec("pytest") is None:
        sys.path.append(str(host_setup.borrow_tools(host.HOME)))
    import pytest

    root = Path(__file__).absolute().parents[1]
    chosen = any(Path(argument.split("::")[0]).exists() for argument in for_pytest)
    targets = [] if chosen else [str(root / "tests")]
    side_by_side = [] if chosen else workers(for_pytest)
    options = ["--rootdir", str(root), "-c", str(root / "pyproject.toml"), *side_by_side]
    return pytest.main([*options, *for_pytest, *targets])


def workers(for_pytest):
    """pytest-xdist's options: a process per core, with one thread each; nothing where it is missing or was chosen."""
    count = min(os.cpu_count() or 1, 4)
    if count < 2 or importlib.util.find_spec("xdist") is None or any(a.startswith("-n") for a in for_pytest):
        return []
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores make torch crawl
    return ["-n", str(count), "--dist", "worksteal"]


def on_versions(versions, for_pytest):
    """Each version in a process of its own; the code of the first that failed."""
    codes = {}
    for version in versions:
        environment = {**os.environ, "STEER_HOST_VERSION": version}
        environment.pop("COMFYUI_PATH", None)
        codes[version] = subprocess.run([sys.executable, __file__, *for_pytest], env=environment).returncode
    for version, code in codes.items():
        print(f"ComfyUI {version}: {'passed' if code == 0 else f'exit code {code}'}", flush=True)
    return next((code for code in codes.values() if code), 0)


if __name__ == "__main__":
    sys.exit(main())
