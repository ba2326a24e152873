"""--set, --seed and --steps: what they reach, what they refuse, and that the embedded workflow says the same."""

import json

import host
import pytest
from headless import edit
from headless.convert import convert

GRAPHS = host.ROOT / "tests" / "workflows" / "graphs"


def read(name):
    return edit.read(json.loads((GRAPHS / f"{name}.json").read_text()), host.definition)


def api(name):
    document = read(name)
    return edit.read(document.prompt, host.definition)


@pytest.mark.parametrize("form", [read, api])
@pytest.mark.parametrize("name, text, node_id, field, value", [
    ("texts", "Positive.text=a hat = a cap", "2", "text", "a hat = a cap"),
    ("texts", "KSampler.cfg=4.5", "5", "cfg", 4.5),
    ("texts", "5.steps=3", "5", "steps", 3),
    ("texts", "KSampler.sampler_name=heun", "5", "sampler_name", "heun"),
    ("subgraphs", "8:19.cfg=2", "8:19", "cfg", 2.0),
    ("subgraphs", "12:25:19.seed=9", "12:25:19", "seed", 9),
    ("dynamic", "2.resize_type.width=48", "2", "resize_type.width", 48),
    ("old_promotions", "8:30.steps=3", "8:30", "steps", 3),
])
def test_set(form, name, text, node_id, field, value):
    document = form(name)
    before = document.prompt[node_id]["inputs"][field]
    document = edit.apply_set(document, text)
    after = document.prompt[node_id]["inputs"][field]
    assert after == value != before
    assert type(after) is type(value)


@pytest.mark.parametrize("name, text", [
    ("texts", "KSampler.cfg=4.5"), ("subgraphs", "8:19.cfg=2"), ("subgraphs", "12:25:19.seed=9"),
    ("old_promotions", "8:30.steps=3"), ("old_promotions", "8:30.denoise=0.2"), ("primitives", "5.seed=8"),
    ("dynamic", "3.resize_type=scale dimensions"),
])
def test_embedded_workflow_says_what_ran(name, text):
    document = edit.apply_set(read(name), text)
    assert document.prompt != read(name).prompt
    assert convert(json.loads(json.dumps(document.raw)), host.definition) == document.prompt


def test_set_of_a_promoted_widget_leaves_the_other_instance_alone():
    before = read("subgraphs").prompt
    after = edit.apply_set(read("subgraphs"), "8:19.cfg=2").prompt
    assert [key for key in before if before[key] != after[key]] == ["8:19"]


def test_primitive_changes_all_that_it_feeds():
    after = edit.apply_set(read("primitives"), "5.seed=8").prompt
    assert (after["5"]["inputs"]["seed"], after["9"]["inputs"]["seed"]) == (8, 8)


def test_another_option_brings_its_own_inputs():
    inputs = edit.apply_set(read("dynamic"), "3.resize_type=scale dimensions").prompt["3"]["inputs"]
    assert {"resize_type.width", "resize_type.height"} <= set(inputs)
    assert "resize_type.multiplier" not in inputs


@pytest.mark.parametrize("name, text, message", [
    ("texts", "KSampler=4", r'expected the form "Node title.input=value"'),
    ("texts", "KSampler.sead=4", r'node 5 "KSampler" has no input \'sead\' to set. It has: seed, steps, cfg'),
    ("texts", "Nobody.text=x", r"no node is called 'Nobody'.*\n.*Load Checkpoint: ckpt_name\n.* 2  Positive: text"),
    ("texts", "KSampler.model=x", r"'model' of node 5 \"KSampler\" is fed by node 1 \"Load Checkpoint\""),
    ("texts", "KSampler.steps=1.5", r"input 'steps' of node 5 \"KSampler\" takes a whole number"),
    ("texts", "KSampler.sampler_name=hoin", r"is one of: euler, .*heun"),
    ("subgraphs", "Inner sampler.cfg=2", r"there are 3 such nodes.*8:19.cfg"),
])
def test_wrong_set_says_what_there_is(name, text, message):
    with pytest.raises(edit.EditError, match=message):
        edit.apply_set(read(name), text)


def test_seed_reaches_every_seed():
    prompt = edit.apply_everywhere(read("subgraphs"), "--seed", ("seed", "noise_seed"), 11).prompt
    seeds = [entry["inputs"]["seed"] for entry in prompt.values() if "seed" in entry["inputs"]]
    assert len(seeds) > 4 and set(seeds) == {11}


def test_steps_follow_a_link_to_the_node_that_holds_the_number():
    document = read("primitives")
    source = document.prompt["5"]["inputs"]["steps"][0]
    prompt = edit.apply_everywhere(document, "--steps", ("steps",), 3).prompt
    assert prompt[source]["inputs"]["value"] == 3


def test_steps_where_there_are_none():
    with pytest.raises(edit.EditError, match=r"--steps: no node of this workflow has an input steps"):
        edit.apply_everywhere(read("dynamic"), "--steps", ("steps",), 3)


def test_neither_format():
    with pytest.raises(edit.EditError, match="neither"):
        edit.read({"nodes": 3}, host.definition)
