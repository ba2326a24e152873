"""Every shipped workflow, through the host's validation and executor; and the main job as a user calls it."""

import json
import subprocess
import sys

import host
import host_run
import pytest
import torch
from headless.convert import convert
from PIL import Image

SHIPPED = sorted((host.ROOT / "workflows").glob("*.json"))
NEEDS = {p: json.loads(p.read_text(encoding="utf-8")).get("extra", {}).get("needs") for p in SHIPPED}
WORKFLOWS = [p for p in SHIPPED if not NEEDS[p]]
PUBLIC = [p for p in SHIPPED if NEEDS[p]]  # they need public files, {folder: names}, and are validated alone


def prompt_of(path, steps):
    """The workflow as the page would send it, with fewer steps."""
    prompt = convert(json.loads(path.read_text(encoding="utf-8")), host.definition)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return prompt


def decoded(prompt, result):
    """Pictures by the title of the node that decodes them."""
    return {n["_meta"]["title"]: result[i][0] for i, n in prompt.items() if n["class_type"] == "VAEDecode"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_runs(path):
    prompt = prompt_of(path, steps=4)
    result = host.execute(prompt)
    saving = [i for i, n in prompt.items() if n["class_type"] == "SaveImage"]
    assert saving and all(len(result.ui[i]["images"]) >= 1 for i in saving)
    pictures = decoded(prompt, result)
    saved = [result[node][slot] for node, slot in (prompt[i]["inputs"]["images"] for i in saving)]
    assert all(p.isfinite().all() and p.std() > 0.05 for p in (*saved, *pictures.values()))
    if "Decode off" in pictures:
        # Adaptive Guidance is for the same picture with fewer rows
        least = 0.001 if path.stem == "guidance-adaptiveguidance" else 0.01
        off = pictures.pop("Decode off")
        steered = [p for p in pictures.values() if p.shape == off.shape]
        assert steered and all((p - off).abs().mean() > least for p in steered)


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_a_workflow_for_public_files_lacks_nothing_else(path):
    """The host's validation finds no fault in it but files that are not there, and the workflow names these."""
    prompt = prompt_of(path, steps=1)
    _, error, _, node_errors = host_run.validate(prompt, path.stem)
    faults = host_run.faults_of(prompt, node_errors, error) if node_errors else []
    named = {name for names in NEEDS[path].values() for name in names}

    def file(value):
        return str(value).split(" [")[0]  # SteerLoadAdapter marks the folder

    assert named <= {file(v) for node in prompt.values() for v in node["inputs"].values()}
    assert [text for i, name, text in faults if file(prompt[i]["inputs"].get(name)) not in named] == []


def test_turned_off_in_the_workflow_is_off():
    (path,) = (p for p in WORKFLOWS if p.stem == "guidance-pag")
    prompt = prompt_of(path, steps=4)
    for node in prompt.values():
        if node["class_type"] == "SteerPAG":
            node["inputs"]["scale"] = 0.0
    pictures = decoded(prompt, host.execute(prompt))
    assert torch.equal(pictures["Decode on"], pictures["Decode off"])


def test_a_wrong_layer_is_told_by_its_node():
    (path,) = (p for p in WORKFLOWS if p.stem == "guidance-pag")
    prompt = prompt_of(path, steps=1)
    (node_id,) = (i for i, n in prompt.items() if n["class_type"] == "SteerPAG")
    prompt[node_id]["inputs"]["layers"] = "double.3"
    with pytest.raises(host.PromptError, match='SteerPAG: no layer "double.3"; this model has') as error:
        host.execute(prompt)
    assert error.value.faults[0][0] == node_id


def test_main_job(tmp_path):
    """`python workflows/run.py guidance-pag`."""
    command = [sys.executable, str(host.ROOT / "workflows" / "run.py"), "guidance-pag", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--steps", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = [line for line in done.stdout.splitlines() if line.endswith(".png")]
    assert len(written) == 12 and all(Image.open(p).size == (128, 128) for p in written)
    assert "workflow" in Image.open(written[0]).text
