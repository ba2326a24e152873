"""`python workflows/run.py`, as a user calls it."""

import json
import subprocess
import sys

import host
import pytest
from PIL import Image

RUN = host.ROOT / "workflows" / "run.py"
PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 255},
          "_meta": {"title": "Canvas"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test/picture"}},
    "3": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}, "_meta": {"title": "Message"}},
    "4": {"class_type": "PrimitiveString", "inputs": {"value": "hello"}},
}
BROKEN = {
    "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 1}},
    "2": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 32, "length": 5, "batch_size": 1}},
    "3": {"class_type": "LatentAdd", "inputs": {"samples1": ["2", 0], "samples2": ["1", 0]},
          "_meta": {"title": "Sum"}},
    "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
}


@pytest.fixture
def run(tmp_path):
    def call(workflow, *arguments):
        if isinstance(workflow, dict):
            path = tmp_path / "workflow.json"
            path.write_text(json.dumps(workflow))
            workflow = str(path)
        command = [sys.executable, str(RUN), workflow, *arguments, "--out", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    return call


def saved(done):
    """The pictures it says it has written."""
    return [Image.open(line) for line in done.stdout.splitlines() if line.endswith(".png")]


def test_in_process(run):
    workflow = json.loads((host.ROOT / "tests/workflows/graphs/picture.json").read_text())
    done = run(workflow, "--set", "Canvas.width=32")
    assert done.returncode == 0, done.stderr
    picture, = saved(done)
    assert picture.size == (32, 48)
    embedded = json.loads(picture.text["workflow"])
    assert embedded["nodes"][0]["widgets_values"][0] == 32 and embedded["id"] == workflow["id"]
    assert json.loads(picture.text["prompt"])["1"]["inputs"]["width"] == 32


def test_failing_node_in_process(run):
    done = run(BROKEN)
    assert done.returncode == 1
    assert 'node 3 "Sum" (LatentAdd): ' in done.stderr


def test_on_a_server(run, server):
    done = run(PICTURE, "--server", server.url, "--set", "Canvas.height=16")
    assert done.returncode == 0, done.stderr
    assert "Message: hello" in done.stdout
    picture, = saved(done)
    assert picture.size == (64, 16)
    again = run(PICTURE, "--server", server.url, "--set", "Canvas.height=16")
    assert saved(again)[0].filename != picture.filename


def test_failing_node_on_a_server(run, server):
    done = run(BROKEN, "--server", server.url)
    assert done.returncode == 1
    assert 'node 3 "Sum" (LatentAdd): ' in done.stderr


def test_refused_prompt_on_a_server(run, server):
    done = run(PICTURE, "--server", server.url, "--set", "Canvas.height=-5")
    assert done.returncode == 3
    assert "node 1 \"Canvas\" (EmptyImage), input 'height': " in done.stderr


def test_unknown_node_on_a_server(run, server):
    done = run({"7": {"class_type": "NoSuchNode", "inputs": {}}}, "--server", server.url)
    assert done.returncode == 3
    assert "NoSuchNode" in done.stderr


def test_no_server(run):
    done = run(PICTURE, "--server", "127.0.0.1:9")
    assert done.returncode == 4
    assert "127.0.0.1:9" in done.stderr


def test_no_such_workflow(run):
    done = run("nothing-of-that-name")
    assert done.returncode == 2
    assert "nothing-of-that-name" in done.stderr


def test_list():
    done = subprocess.run([sys.executable, str(RUN), "--list"], capture_output=True, text=True)
    assert done.stdout.split() == sorted(path.stem for path in RUN.parent.glob("*.json"))
