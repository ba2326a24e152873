"""The rules of the house: where things lie, what every node says of itself, what code never does."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields

import host
import pytest
from steer.nodes import discover
from steer.patches.shared.steering import Term

ROOT = host.ROOT
PATCHES, NODES, TESTS, WORKFLOWS = (ROOT / name for name in ("patches", "nodes", "tests", "workflows"))
DOCS = NODES / "help" / "docs"
CODE = [p for p in ROOT.rglob("*.py") if not {".steer", "output"} & set(p.relative_to(ROOT).parts)]
GRAPHS = sorted(WORKFLOWS.glob("*.json"))
CLASSES = discover()
METHODS = sorted(
    (path.parent.name, path.stem)
    for path in PATCHES.glob("*/*.py")
    if path.stem != "__init__" and path.parent.name != "shared"
)


def types_in(graph):
    """Node types of a workflow in the page's format, subgraphs included."""
    subgraphs = graph.get("definitions", {}).get("subgraphs", [])
    ids = {s["id"] for s in subgraphs}
    return {n["type"] for g in (graph, *subgraphs) for n in g["nodes"] if n["type"] not in ids}


def runs(path):
    """Whether a workflow runs with what is part of this pack: it names no public files that it needs, and without which
    there is no picture of it."""
    return "needs" not in json.loads(path.read_text(encoding="utf-8")).get("extra", {})


@pytest.mark.parametrize("room, method", METHODS)
def test_a_method_has_its_mates(room, method):
    workflow = WORKFLOWS / f"{room}-{method}.json"
    mates = [NODES / room / f"{method}.py", TESTS / room / f"test_{method}.py", workflow]
    if not workflow.is_file() or runs(workflow):
        mates.append(workflow.with_suffix(".jpg"))
    assert [str(m.relative_to(ROOT)) for m in mates if not m.is_file()] == []


def test_no_mate_is_alone():
    rooms = {room for room, _ in METHODS}
    found = {(p.parent.name, p.stem) for p in NODES.glob("*/*.py") if p.parent.name in rooms and p.stem != "__init__"}
    assert found == set(METHODS)
    assert {p.stem for p in GRAPHS} >= {f"{room}-{method}" for room, method in METHODS}
    assert {p.stem for p in WORKFLOWS.glob("*.jpg")} == {p.stem for p in GRAPHS if runs(p)}


def test_no_field_of_a_term_hides_one_of_its_places():
    def below(kind):
        return {each for child in kind.__subclasses__() for each in (child, *below(child))}

    places = {name for name in vars(Term) if callable(getattr(Term, name)) and not name.startswith("_")}
    assert {"scale", "step", "attention"} <= places and len(below(Term)) > 30
    assert [(term.__name__, field.name) for term in below(Term) for field in fields(term) if field.name in places] == []


@pytest.mark.parametrize("node", CLASSES, ids=lambda node: node.__name__)
def test_a_node_explains_itself(node):
    schema = node.define_schema()
    assert schema.node_id.startswith("Steer")
    assert schema.category == f"steer/{node.__module__.split('.')[-2]}"
    assert schema.display_name and schema.search_aliases
    assert len(schema.description) > 40
    assert [i.id for i in schema.inputs if not i.tooltip] == []
    page = DOCS / schema.node_id / "en.md"
    assert page.is_file(), f"no help page {page.relative_to(ROOT)}"


def test_node_ids_are_unique():
    ids = [node.define_schema().node_id for node in CLASSES]
    assert len(ids) == len(set(ids)) > 0


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.parent.name)
def test_help_pages_belong_to_nodes_and_their_pictures_exist(page):
    assert page.parent.name in {node.define_schema().node_id for node in CLASSES}
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / picture).is_file(), f"{page.relative_to(ROOT)} shows {picture}, which is not there"


def test_every_node_is_in_a_workflow():
    used = set().union(*(types_in(json.loads(p.read_text(encoding="utf-8"))) for p in GRAPHS))
    assert {node.define_schema().node_id for node in CLASSES} - used == set()


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_workflow_uses_core_nodes_and_ours(path):
    import nodes

    page_only = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
    assert types_in(json.loads(path.read_text(encoding="utf-8"))) - set(nodes.NODE_CLASS_MAPPINGS) <= page_only


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_keep_the_rules(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (400 if TESTS in path.parents else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except hides errors"
        if isinstance(node, ast.Attribute) and node.attr == "__class__":
            assert not isinstance(node.ctx, ast.Store), f"line {node.lineno}: assigns __class__"
        if PATCHES in path.parents and isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("torch.manual_seed", "torch.load", "print"), f"line {node.lineno}: calls {name}"


def test_patches_import_without_the_host():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PATCHES.rglob("*.py")]
    code = f"""
import importlib.util, sys
for name in ("comfy", "comfy_api", "folder_paths", "nodes", "execution"):
    sys.modules[name] = None
spec = importlib.util.spec_from_file_location("steer", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
sys.modules["steer"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["steer"])
for name in {names!r}:
    importlib.import_module("steer." + name.removesuffix(".__init__"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
