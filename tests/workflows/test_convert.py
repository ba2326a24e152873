"""Files that cannot become a prompt, and what the page decides by chance or by the clock."""

import json
import random
import re

import host
import pytest
from headless import widgets
from headless.convert import convert
from headless.graph import ConversionError

GRAPHS = host.ROOT / "tests" / "workflows" / "graphs"


def graph(name):
    return json.loads((GRAPHS / f"{name}.json").read_text())


def node(raw, number):
    return next(entry for entry in raw["nodes"] if entry["id"] == number)


def test_unknown_node_is_named():
    raw = graph("texts")
    node(raw, 5)["type"] = "SamplerOfAnotherPack"
    with pytest.raises(ConversionError, match=r"node 5 .*no node type 'SamplerOfAnotherPack'"):
        convert(raw, host.definition)


@pytest.mark.parametrize("mode", [2, 4])
def test_unknown_node_does_not_matter_when_it_is_off(mode):
    raw = graph("modes")
    lora = next(entry for entry in raw["nodes"] if entry["type"] == "LoraLoader")
    assert lora["mode"] == 4
    as_loader = convert(raw, host.definition)
    lora["type"], lora["mode"] = "LoaderOfAnotherPack", mode
    assert (convert(raw, host.definition) == as_loader) == (mode == 4)


def test_missing_link_is_named():
    raw = graph("texts")
    number = node(raw, 5)["inputs"][0]["link"]
    raw["links"] = [link for link in raw["links"] if link[0] != number]
    with pytest.raises(ConversionError, match=rf"node 5 .*input 'model': its link {number}"):
        convert(raw, host.definition)


def test_links_in_a_circle():
    raw = graph("reroutes")
    first, second = (entry for entry in raw["nodes"] if entry["type"] == "Reroute" and entry["id"] in (6, 7))
    link = next(entry for entry in raw["links"] if entry[0] == first["inputs"][0]["link"])
    link[1] = second["id"]
    with pytest.raises(ConversionError, match="circle"):
        convert(raw, host.definition)


def test_choices_in_a_prompt():
    text = r"{red|green {dark|light}} \{kept\} // not this"
    found = {widgets.resolve_prompt(text) for _ in range(200)}
    assert found == {"red {kept} ", "green dark {kept} ", "green light {kept} "}


def test_choices_follow_the_seed_of_the_process():
    random.seed(1)
    first = [widgets.resolve_prompt("{a|b|c|d}") for _ in range(20)]
    random.seed(1)
    assert [widgets.resolve_prompt("{a|b|c|d}") for _ in range(20)] == first
    assert len(set(first)) > 1


def test_date_in_a_file_name():
    name = widgets.fill_file_name("x_%date:yyyy-MM-dd_hh%_%date:yy%", lambda *_: None)
    assert re.fullmatch(r"x_20\d\d-[01]\d-[0-3]\d_[0-2]\d_\d\d", name)
