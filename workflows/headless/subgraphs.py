"""Subgraphs of a workflow file: unique node ids, and the widgets that a subgraph shows on its outside."""

import copy

from .graph import build, fed_by, saved_slot
from .widgets import Slot, Widget


def definitions_of(raw):
    """All subgraph definitions of a file, inner ones included."""
    found = []
    for definition in (raw.get("definitions") or {}).get("subgraphs") or []:
        found += [definition, *definitions_of(definition)]
    return found


def with_unique_ids(raw):
    """A copy in which no node of a subgraph has the id of a node elsewhere. The page renumbers them the same way."""
    raw = copy.deepcopy(raw)
    used = {str(node["id"]) for node in raw.get("nodes") or []}
    last = max(raw.get("last_node_id") or 0, (raw.get("state") or {}).get("lastNodeId") or 0)
    for definition in definitions_of(raw):
        renamed = {}
        for node in definition.get("nodes") or []:
            number = str(node["id"])
            if number not in used:
                used.add(number)
                last = max(last, int(number)) if number.isdigit() else last
                continue
            last += 1
            while str(last) in used:
                last += 1
            used.add(str(last))
            renamed[number] = node["id"] = last
        for link in definition.get("links") or []:
            for end in ("origin_id", "target_id"):
                link[end] = renamed.get(str(link[end]), link[end])
        for host in hosts_of(raw, definition["id"]):
            for entry in (host.get("properties") or {}).get("proxyWidgets") or []:
                entry[0] = str(renamed.get(str(entry[0]), entry[0]))
    return raw


def hosts_of(raw, subgraph_id):
    levels = [raw, *definitions_of(raw)]
    return [node for level in levels for node in level.get("nodes") or [] if node.get("type") == subgraph_id]


class Library:
    """The subgraphs of a file, each built once, inner ones first."""

    def __init__(self, raw, definition):
        self.definition = definition
        self.raw = {entry["id"]: entry for entry in definitions_of(raw)}
        self.graphs = {}

    def subgraph(self, kind):
        if kind not in self.raw:
            return None
        if kind not in self.graphs:
            entry = self.raw[kind]
            self.graphs[kind] = build(entry, self, entry.get("name") or kind)
        return self.graphs[kind]

    def fill_host(self, node):
        fill_host(node)


def inner_targets(graph, position):
    """The slots inside a subgraph that its input number `position` feeds: pairs of node and slot."""
    order = {number: i for i, number in enumerate(graph.inputs[position].get("linkIds") or [])}
    links = [link for link in graph.links.values() if link.origin == graph.input_id and link.origin_slot == position]
    for link in sorted(links, key=lambda link: order.get(link.id, len(order))):
        node = graph.nodes.get(link.target)
        slot = next((s for s in node.slots if s.link == link.id), None) if node else None
        if slot:
            yield node, slot


def fill_host(node):
    """Slots and promoted widgets of a subgraph node. A promoted widget starts with the value of the inner one."""
    graph, raw = node.subgraph, node.raw
    saved = {slot["name"]: saved_slot(slot) for slot in raw.get("inputs") or []}
    for position, entry in enumerate(graph.inputs):
        link = saved[entry["name"]].link if entry["name"] in saved else None
        slot = Slot(entry["name"], str(entry.get("type", "*")), link=link)
        node.slots.append(slot)
        for inner, inner_slot in inner_targets(graph, position):
            source = inner.widget(inner_slot.widget) if inner_slot.widget else None
            if source is not None:
                slot.widget = slot.name
                node.widgets.append(Widget(slot.name, source.type, source.value))
                break
    values = raw.get("widgets_values") or []
    for widget, value in zip(node.widgets, values, strict=False):
        widget.value = value
    fill_from_proxies(node, (raw.get("properties") or {}).get("proxyWidgets") or [], values)


def fill_from_proxies(node, entries, values):
    """Older files name the promoted widgets by (inner node, widget) and keep their values in that order."""
    for i, (inner_id, name, *_) in enumerate(entries):
        value = values[i] if i < len(values) else None
        inner = node.subgraph.nodes.get(str(inner_id))
        if inner is None or name.startswith("$$"):
            continue
        promoted = promoted_slot(node, inner, name)
        if promoted is not None:
            if value is not None:
                node.widget(promoted.name).value = value
        elif inner.type == "PrimitiveNode":
            for target, slot in fed_by(node.subgraph, inner):
                # The first node that shows the subgraph takes the primitive out of it; then its value is gone.
                own = target.widget(slot.widget) if inner.id in node.subgraph.bypassed else inner.widgets[0]
                override(node, target, slot.name, own.value if value is None else value)
            node.subgraph.bypassed.add(inner.id)
        elif inner.widget(name) is not None and value is not None:
            override(node, inner, name, value)


def saved_values(node, changed):
    """The list in which a subgraph node keeps its values, after one of its widgets has changed."""
    entries = (node.raw.get("properties") or {}).get("proxyWidgets")
    if not entries:
        return [widget.value for widget in node.widgets]
    values = list(node.raw.get("widgets_values") or [])
    values += [None] * (len(entries) - len(values))
    for i, (inner_id, name, *_) in enumerate(entries):
        inner = node.subgraph.nodes.get(str(inner_id))
        if inner is not None and changed in proxied(node, inner, name):
            values[i] = changed.value
    return values


def proxied(node, inner, name):
    slot = promoted_slot(node, inner, name)
    targets = fed_by(node.subgraph, inner) if inner.type == "PrimitiveNode" else ()
    keys = [(inner.id, name), *((target.id, fed.name) for target, fed in targets)]
    return [node.widget(slot.name)] if slot else [node.overrides[key] for key in keys if key in node.overrides]


def override(node, inner, name, value):
    node.overrides[inner.id, name] = Widget(name, "", value)


def promoted_slot(node, inner, name):
    for position, slot in enumerate(node.slots):
        feeds = inner_targets(node.subgraph, position) if slot.widget else ()
        if any(target is inner and name in (s.widget, s.name) for target, s in feeds):
            return slot
    return None
