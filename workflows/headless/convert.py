"""Turns a workflow as the page saves it into the prompt that the page would send.

`convert(workflow, definition)` gives {node id: {class_type, inputs, _meta}}, equal to the page's own: reroutes and
notes disappear, bypassed nodes are stepped over, muted ones dropped, subgraphs unfolded, primitives filled in.
`definition(type)` is the host's description of a node type (an entry of /object_info) or None.
"""

from dataclasses import dataclass

from . import graph as graphs
from . import subgraphs, widgets
from .graph import BYPASSED, MUTED, ConversionError


@dataclass(frozen=True, eq=False)
class Level:
    """One unfolded occurrence of a graph: the root, or a subgraph as a certain chain of nodes shows it."""

    graph: graphs.Graph
    path: tuple = ()
    host: graphs.Node | None = None
    parent: "Level | None" = None

    def id(self, node):
        return ":".join((*self.path, node.id))

    def inside(self, host):
        return Level(host.subgraph, (*self.path, host.id), host, self)


@dataclass(frozen=True)
class Value:
    """What feeds a slot when it is no link: a promoted widget."""

    widget: widgets.Widget


def convert(workflow, definition):
    return Workflow(workflow, definition).prompt


class Workflow:
    """A workflow in the page's format, the prompt it becomes, and the widget behind every value of the prompt."""

    def __init__(self, workflow, definition):
        self.definition = definition
        self.raw = subgraphs.with_unique_ids(workflow)
        library = subgraphs.Library(self.raw, definition)
        root = Level(graphs.build(self.raw, library))
        self.graphs = [root.graph, *library.graphs.values()]
        for graph in self.graphs:
            graphs.apply_primitives(graph)
        self.prompt, self.sources = {}, {}
        for level, node in walk(root):
            if node.active and not node.virtual:
                inputs, self.sources[level.id(node)] = inputs_of(level, node, root)
                meta = {"title": node.title}
                self.prompt[level.id(node)] = {"inputs": inputs, "class_type": node.type, "_meta": meta}
        for entry in self.prompt.values():
            entry["inputs"] = {name: value for name, value in entry["inputs"].items()
                               if not (is_link(value) and value[0] not in self.prompt)}

    def with_value(self, node_id, name, value):
        """A copy with another value for an input, in the prompt and in the workflow that is embedded in pictures."""
        widget = self.sources[node_id][name]
        widget = widget.source or widget
        for node in (node for graph in self.graphs for node in graph.nodes.values()):
            if any(w is widget for w in [*node.widgets, *node.overrides.values()]):
                widget.value = value
                node.raw["widgets_values"] = self.saved_values(node, widget)
        return Workflow(self.raw, self.definition)

    def saved_values(self, node, changed):
        if node.subgraph is not None:
            return subgraphs.saved_values(node, changed)
        if isinstance(node.raw.get("widgets_values"), dict):
            return {**node.raw["widgets_values"], changed.name: changed.value}
        if changed.type == "COMFY_DYNAMICCOMBO_V3":  # another option shows other widgets
            specs = widgets.specs_of(self.definition(node.type))
            return [w.value for w in widgets.widgets_of(specs, {w.name: w.value for w in node.widgets})]
        return [w.value for w in node.widgets]


def walk(level):
    """All nodes, those of subgraphs in place. Only on the outermost level does a muted subgraph hide its inside."""
    for node in level.graph.nodes.values():
        yield level, node
        if node.subgraph is not None and (node.active or level.parent is not None):
            yield from walk(level.inside(node))


def is_link(value):
    return isinstance(value, list) and len(value) == 2


def inputs_of(level, node, root):
    inputs, sources = {}, {}
    for widget in node.widgets:
        if widget.sent and widget.name:
            inputs[widget.name] = sent_value(widget, node, root)
            sources[widget.name] = widget
    for index, slot in enumerate(node.slots):
        origin = resolve_input(level, node, index, set())
        if isinstance(origin, Value):
            inputs[slot.name] = boxed(origin.widget)
            sources[slot.name] = origin.widget
        elif origin is not None:
            inputs[slot.name] = list(origin)
            sources.pop(slot.name, None)
    return inputs, sources


def sent_value(widget, node, root):
    if isinstance(widget.value, str):
        if widget.dynamic_prompt:
            return widgets.resolve_prompt(widget.value)
        if widget.name == "filename_prefix" and node.type in widgets.SAVE_NODES:
            return widgets.fill_file_name(widget.value, lambda name, field: find_value(root, name, field))
    return boxed(widget)


def boxed(widget):
    """A list would read as a link, so the page wraps it."""
    if not isinstance(widget.value, list):
        return widget.value
    return {"__value__": widget.value, **({"__type__": "CURVE"} if widget.type == "CURVE" else {})}


def find_value(root, name, field):
    """The value that %name.field% in a file name stands for: a node by its alias, else by its title."""
    nodes = [node for _, node in walk(root)]
    named = [n for n in nodes if (n.raw.get("properties") or {}).get("Node name for S&R") == name]
    named = named or [n for n in nodes if n.title == name]
    widget = named[0].widget(field) if named else None
    return None if widget is None else widget.value


# --- what feeds a slot --------------------------------------------------------------------------------------------


def resolve_input(level, node, index, visited, kind=None):
    """(node id, output) of the node that really feeds a slot, a Value, or None when nothing does."""
    guard(level, node, "input", index, visited)
    slot = node.slots[index]
    if slot.link is None:
        return overridden(level, node, slot)
    link = level.graph.links.get(slot.link)
    if link is None:
        raise ConversionError(f"{node.label}, input {slot.name!r}: its link {slot.link} is not in the file.")
    if level.host is not None and link.origin == level.graph.input_id:
        return resolve_outside(level, link.origin_slot, visited)
    origin = level.graph.nodes.get(link.origin)
    if origin is None:
        raise ConversionError(f"{node.label}, input {slot.name!r}: node {link.origin} feeds it, but is not there.")
    found = resolve_output(level, origin, link.origin_slot, slot.type if kind is None else kind, visited)
    return found or overridden(level, node, slot)


def resolve_outside(level, position, visited):
    """Up through an input of the subgraph: what feeds it there, or its promoted widget."""
    host = level.host
    slot = host.slots[position]
    if slot.link is not None:
        return resolve_input(level.parent, host, position, visited)
    outer = overridden(level.parent, host, slot)
    return outer or (Value(host.widget(slot.widget)) if slot.widget else None)


def overridden(level, node, slot):
    widget = level.host.overrides.get((node.id, slot.name)) if level.host else None
    return Value(widget) if widget else None


def resolve_output(level, node, index, kind, visited):
    guard(level, node, "output", index, visited)
    if node.mode == MUTED:
        return None
    if node.mode == BYPASSED:
        through = bypass_slot(node, index, kind)
        return None if through is None else resolve_input(level, node, through, visited)
    if node.subgraph is not None:
        inside = level.inside(node)
        for link in exits(node.subgraph, index):
            return resolve_output(inside, inside.graph.nodes[link.origin], link.origin_slot, kind, visited)
        return None
    if node.virtual:  # a reroute passes its input on; a primitive has none, its value is in the widget already
        return resolve_input(level, node, index, visited, kind) if index < len(node.slots) else None
    return level.id(node), index


def exits(graph, index):
    """The links that end in output number `index` of a subgraph; the first one counts."""
    order = {number: i for i, number in enumerate(graph.outputs[index].get("linkIds") or [])}
    links = [link for link in graph.links.values() if link.target == graph.output_id and link.target_slot == index]
    return sorted(links, key=lambda link: order.get(link.id, len(order)))


def bypass_slot(node, index, kind):
    """The input that takes an output's place when the node is bypassed."""
    if kind in ("*", ""):
        return index if len(node.slots) > index else 0
    types = [slot.type for slot in node.slots]
    output = node.outputs[index]

    def fits(slot_type):
        return compatible(slot_type, output) and compatible(slot_type, kind)

    if index < len(types) and fits(types[index]):
        return index
    if kind in types:
        return types.index(kind)
    return next((i for i, slot_type in enumerate(types) if fits(slot_type)), None)


def compatible(a, b):
    if a in ("*", "") or b in ("*", ""):
        return True
    return bool(set(a.lower().split(",")) & set(b.lower().split(",")))


def guard(level, node, side, index, visited):
    key = (level.path, node, side, index)
    if key in visited:
        raise ConversionError(f"{node.label}: its links run in a circle.")
    visited.add(key)
