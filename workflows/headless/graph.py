"""A workflow file as the page holds it: graphs of nodes and links, subgraphs included, with every widget filled."""

from dataclasses import dataclass, field

from . import widgets

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
OUTSIDE_ONLY = ("Reroute", "PrimitiveNode", *NOTES)  # nodes of the page that the host never sees


class ConversionError(ValueError):
    """The workflow cannot become a prompt; the message names the node."""


@dataclass
class Link:
    id: int
    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(eq=False)
class Node:
    id: str
    type: str
    mode: int
    title: str
    raw: dict
    slots: list = field(default_factory=list)
    widgets: list = field(default_factory=list)
    outputs: list = field(default_factory=list)  # types
    subgraph: "Graph | None" = None
    overrides: dict = field(default_factory=dict)  # of a subgraph: (inner node id, slot name) -> Widget, old files only

    @property
    def active(self):
        return self.mode not in (MUTED, BYPASSED)

    @property
    def virtual(self):
        return self.subgraph is not None or self.type in OUTSIDE_ONLY

    @property
    def label(self):
        return f'node {self.id} "{self.title}"' if self.title != self.type else f"node {self.id} ({self.type})"

    def widget(self, name):
        return next((w for w in self.widgets if w.name == name), None)


@dataclass(eq=False)
class Graph:
    name: str
    nodes: dict
    links: dict
    inputs: list = field(default_factory=list)  # of a subgraph: what it shows to the outside
    outputs: list = field(default_factory=list)
    input_id: str = "-10"
    output_id: str = "-20"
    bypassed: set = field(default_factory=set)  # primitives of old files that promoted widgets have replaced


def links_of(raw):
    """Both forms: lists in the root of most files, objects in subgraphs and in newer files."""
    links = {}
    for entry in raw.get("links") or []:
        if isinstance(entry, dict):
            entry = [entry[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        elif entry is None:
            continue
        number, origin, origin_slot, target, target_slot = entry[:5]
        links[number] = Link(number, str(origin), int(origin_slot), str(target), int(target_slot))
    return links


def build(raw, library, name="workflow"):
    """The graph of one level. The library knows the host's node types and the file's subgraphs."""
    graph = Graph(name, {}, links_of(raw), raw.get("inputs") or [], raw.get("outputs") or [],
                  str((raw.get("inputNode") or {}).get("id", -10)), str((raw.get("outputNode") or {}).get("id", -20)))
    for entry in raw.get("nodes") or []:
        graph.nodes[str(entry["id"])] = build_node(entry, library)
    return graph


def build_node(raw, library):
    kind = str(raw.get("type"))
    node = Node(str(raw["id"]), kind, raw.get("mode") or 0, raw.get("title") or kind, raw)
    saved_slots = raw.get("inputs") or []
    saved_outputs = [output.get("type", "*") for output in raw.get("outputs") or []]
    node.subgraph = library.subgraph(kind)
    if node.subgraph is not None:
        node.title = raw.get("title") or node.subgraph.name
        node.outputs = [output["type"] for output in node.subgraph.outputs]
        library.fill_host(node)
        return node
    described = None if kind in OUTSIDE_ONLY else library.definition(kind)
    if described is None:
        if node.active and not node.virtual:
            hint = " (A group node: convert it to a subgraph.)" if kind.startswith("workflow") else ""
            raise ConversionError(f"{node.label}: the host has no node type {kind!r}. The pack that brings it is not "
                                  f"installed.{hint}")
        node.slots = [saved_slot(slot) for slot in saved_slots]
        node.outputs = saved_outputs
        if kind == "PrimitiveNode":
            node.widgets = [widgets.Widget(f"value {i}" if i else "value", "", value)
                            for i, value in enumerate(raw.get("widgets_values") or [])]
        return node
    node.title = raw.get("title") or described.get("display_name") or kind
    node.outputs = ["COMBO" if isinstance(t, list) else "*" if t == "COMFY_MATCHTYPE_V3" else t
                    for t in described["output"]] + saved_outputs[len(described["output"]):]
    specs = widgets.specs_of(described)
    node.widgets = widgets.widgets_of(specs, raw.get("widgets_values") or [])
    node.slots = widgets.slots_of(specs, node.widgets)
    connect_slots(node, saved_slots)
    return node


def saved_slot(raw):
    return widgets.Slot(raw["name"], str(raw.get("type", "*")), (raw.get("widget") or {}).get("name"), raw.get("link"))


def connect_slots(node, saved_slots):
    """Slots follow the definition; the file tells what feeds them, by name. Others in the file stay, behind them."""
    by_name = {slot.name: slot for slot in node.slots}
    for raw in saved_slots:
        slot = saved_slot(raw)
        if slot.name in by_name:
            by_name[slot.name].link = slot.link
        elif slot.widget is None or node.widget(slot.widget):
            node.slots.append(slot)


def fed_by(graph, primitive):
    """The widgets that a primitive feeds, as pairs of node and slot."""
    for link in graph.links.values():
        target = graph.nodes.get(link.target) if link.origin == primitive.id and primitive.widgets else None
        slot = next((s for s in target.slots if s.link == link.id), None) if target else None
        if slot and slot.widget and target.widget(slot.widget):
            yield target, slot


def apply_primitives(graph):
    """A primitive writes its value into the widgets that it feeds. The page does so before every run."""
    for node in graph.nodes.values():
        if node.type == "PrimitiveNode" and node.id not in graph.bypassed:
            for target, slot in fed_by(graph, node):
                widget = target.widget(slot.widget)
                widget.value, widget.source = node.widgets[0].value, node.widgets[0]
