"""Changes to a workflow before it runs: --set, --seed, --steps. What does not fit is answered with what there is."""

import json

from .convert import Workflow, is_link
from .widgets import Spec, Widget, option_specs, specs_of


class EditError(ValueError):
    """A change names something that is not there, or a value that cannot be."""


class Prompt:
    """A workflow in the API format, with the interface of Workflow. There is nothing to embed but the prompt."""

    raw = None

    def __init__(self, prompt, definition):
        self.definition = definition
        self.prompt = {node_id: {**entry, "inputs": entry.get("inputs") or {}} for node_id, entry in prompt.items()}
        self.sources = {node_id: {name: Widget(name, "", value) for name, value in entry["inputs"].items()
                                  if not is_link(value)} for node_id, entry in self.prompt.items()}

    def with_value(self, node_id, name, value):
        entry = self.prompt[node_id]
        changed = {**entry, "inputs": {**entry["inputs"], name: value}}
        return Prompt({**self.prompt, node_id: changed}, self.definition)


def read(workflow, definition):
    """Either format: the page's has a list of nodes, the API's is one object per node."""
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        return Workflow(workflow, definition)
    entries = list(workflow.values()) if isinstance(workflow, dict) else []
    if entries and all(isinstance(entry, dict) and "class_type" in entry for entry in entries):
        return Prompt(workflow, definition)
    raise EditError("This is neither a workflow as the page saves it nor one in the API format.")


def title(document, node_id):
    entry = document.prompt.get(node_id) or {}
    return (entry.get("_meta") or {}).get("title") or entry.get("class_type", "not there")


def apply_set(document, text):
    """`Node title.input=value`. The node may also be named by its type or its id."""
    target, equals, value = text.partition("=")
    if not equals or "." not in target:
        raise EditError(f"--set {text!r}: expected the form \"Node title.input=value\".")
    found = set()
    for dot in (i for i, char in enumerate(target) if char == "."):  # titles and inputs may both contain dots
        name, field = target[:dot].strip(), target[dot + 1:].strip()
        found |= {(node_id, field) for node_id in named(document, name) if field in document.sources[node_id]}
    if len(found) > 1:
        choices = ", ".join(f"{node_id}.{field}" for node_id, field in sorted(found))
        raise EditError(f"--set {text!r}: there are {len(found)} such nodes. Name one by its id: {choices}.")
    if not found:
        raise EditError(explain(document, text, target))
    (node_id, field), = found
    return document.with_value(node_id, field, parse(document, node_id, field, value, text))


def named(document, name):
    by_id = [node_id for node_id in document.prompt if node_id == name]
    by_title = [node_id for node_id in document.prompt if title(document, node_id) == name]
    by_type = [node_id for node_id, entry in document.prompt.items() if entry["class_type"] == name]
    return by_id or by_title or by_type


def explain(document, text, target):
    for dot in (i for i, char in enumerate(target) if char == "."):
        name, field = target[:dot].strip(), target[dot + 1:].strip()
        for node_id in named(document, name):
            entry, label = document.prompt[node_id], f"node {node_id} \"{title(document, node_id)}\""
            fed = entry["inputs"].get(field)
            if is_link(fed):
                return (f"--set {text!r}: input {field!r} of {label} is fed by node {fed[0]} "
                        f"\"{title(document, fed[0])}\". Set it there, or remove the link.")
            return f"--set {text!r}: {label} has no input {field!r} to set. It has: {settable(document, node_id)}."
    lines = [f"  {number:>4}  {title(document, number)}: {settable(document, number)}" for number in document.prompt]
    return f"--set {text!r}: no node is called {target.rpartition('.')[0]!r}. The workflow has\n" + "\n".join(lines)


def settable(document, node_id):
    return ", ".join(document.sources[node_id]) or "nothing to set"


def parse(document, node_id, field, text, whole):
    """The value as the input's type wants it."""
    spec = spec_of(document, node_id, field)
    where = f"--set {whole!r}: input {field!r} of node {node_id} \"{title(document, node_id)}\""
    try:
        if spec.type == "INT":
            return int(text)
        if spec.type == "FLOAT":
            return float(text)
    except ValueError:
        raise EditError(f"{where} takes {'a whole number' if spec.type == 'INT' else 'a number'}.") from None
    if spec.type == "BOOLEAN":
        if text.lower() not in ("true", "false"):
            raise EditError(f"{where} takes true or false.")
        return text.lower() == "true"
    if spec.type in ("COMBO", "COMFY_DYNAMICCOMBO_V3"):
        return choose(spec, text, where)
    if spec.type == "STRING":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def choose(spec, text, where):
    options = [o["key"] if isinstance(o, dict) else o for o in spec.options.get("options") or []]
    for option in options:
        if str(option) == text:
            return option
    if "options" not in spec.options:  # the list is somewhere else; the host checks it
        return text
    raise EditError(f"{where} is one of: {', '.join(map(str, options)) or 'nothing, the list is empty'}.")


def spec_of(document, node_id, field):
    entry = document.prompt[node_id]
    described = document.definition(entry["class_type"])
    pending = specs_of(described) if described else []
    while pending:
        spec = pending.pop(0)
        if spec.name == field:
            return spec
        if spec.type == "COMFY_DYNAMICCOMBO_V3" and field.startswith(spec.name + "."):
            pending += option_specs(spec, entry["inputs"].get(spec.name))
    return Spec(field, "*")


def apply_everywhere(document, option, names, value):
    """--seed and --steps: every input of that name, or the single value node that feeds it."""
    places = set()
    for node_id, entry in document.prompt.items():
        for name in names:
            fed = entry["inputs"].get(name)
            if name in document.sources[node_id]:
                places.add((node_id, name))
            elif is_link(fed) and list(document.sources.get(fed[0], ())) == ["value"]:
                places.add((fed[0], "value"))
    if not places:
        raise EditError(f"{option}: no node of this workflow has an input {' or '.join(names)} to set.")
    for node_id, name in places:
        document = document.with_value(node_id, name, value)
    return document
