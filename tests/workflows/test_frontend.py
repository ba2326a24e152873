"""The real page in a real browser: workflows load without a complaint and become the prompt that the runner makes."""

import json

import host
import pytest
from headless.convert import convert

SHIPPED = sorted((host.ROOT / "workflows").glob("*.json"))
GRAPHS = sorted((host.ROOT / "tests" / "workflows" / "graphs").glob("*.json"))

SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 150))))"
RED_NODES = """JSON.stringify([app.graph, ...app.graph.subgraphs.values()].flatMap(graph => graph.nodes)
    .filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types))
    .map(node => `${node.id} ${node.type}`))"""


def same(workflow, prompt, converted):
    """Whether two prompts are one. A node that the file does not name has the name of the page's translation there and
    of the host's definition here; the host ignores it."""
    levels = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    named = {node.get("title") for level in levels for node in level["nodes"]}

    def told(whole):
        return {node_id: {**entry, "_meta": entry["_meta"]["title"] if entry["_meta"]["title"] in named else None}
                for node_id, entry in whole.items()}

    assert told(converted) == told(prompt)
    return True


def loaders(workflow):
    """The nodes of a workflow that name the public files it needs; the page marks them where these are missing."""
    names = {name for files in workflow.get("extra", {}).get("needs", {}).values() for name in files}
    return {f"{node['id']} {node['type']}" for node in workflow["nodes"]
            if any(str(value).split(" [")[0] in names for value in node.get("widgets_values", ()))}


def skip_unless_known(workflow):
    """Older hosts lack some of the nodes."""
    levels = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    own = {level.get("id") for level in levels} | {"Reroute", "PrimitiveNode", "Note", "MarkdownNote"}
    kinds = {node["type"] for level in levels for node in level["nodes"] if node.get("mode", 0) == 0} - own
    missing = sorted(kind for kind in kinds if host.definition(kind) is None)
    if missing:
        pytest.skip(f"this host has no {', '.join(missing)}")


def load(page, path):
    """Shows a workflow and returns (its content, the prompt the page would send, what the console said)."""
    page.evaluate(SETTLED)
    page.console.clear()
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate(f"app.loadGraphData({json.dumps(workflow)})")
    page.evaluate(SETTLED)
    prompt = json.loads(page.evaluate("app.graphToPrompt().then(result => JSON.stringify(result.output))"))
    return workflow, prompt, list(page.console)


def test_page_starts_without_errors_of_the_pack(page, server):
    name = host.ROOT.name
    assert [line for line in page.console if f"/extensions/{name}" in line] == []
    assert any(key.startswith("Steer") for key in server.get("/object_info")), "the server has none of our nodes"


def test_help_pages_and_workflows_are_served(server):
    pages = sorted((host.ROOT / "nodes" / "help" / "docs").glob("*/en.md"))
    assert pages
    for page in pages:
        url = f"/extensions/{host.ROOT.name}/docs/{page.parent.name}/en.md"
        assert server.read(url).decode("utf-8").splitlines() == page.read_text(encoding="utf-8").splitlines()
    assert set(server.get("/workflow_templates")[host.ROOT.name]) == {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_workflow(page, path):
    workflow, prompt, console = load(page, path)
    assert console == []
    assert set(json.loads(page.evaluate(RED_NODES))) <= loaders(workflow)
    assert same(workflow, prompt, convert(workflow, host.definition))
    assert page.evaluate("document.querySelectorAll('.p-dialog, .p-toast-message-error').length") == 0


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_conversion_equals_the_page(page, path):
    """Also that of the file which the page then saves: often another form with the same meaning."""
    skip_unless_known(json.loads(path.read_text(encoding="utf-8")))
    workflow, prompt, console = load(page, path)
    assert console == []
    assert same(workflow, prompt, convert(workflow, host.definition))
    assert len(prompt) > 2
    saved = json.loads(page.evaluate("JSON.stringify(app.graph.serialize())"))
    assert same(saved, prompt, convert(saved, host.definition))
