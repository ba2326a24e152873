"""What ComfyUI's page makes of one node: its widgets with their values and its input slots, from the node's definition.

A workflow file keeps widget values in a bare list, so their order has to be rebuilt as the page builds it: one widget
for each input that has one, an extra one after a seed, the inner ones of a dynamic combo after the chosen option.
"""

import datetime
import random
import re
from dataclasses import dataclass, field

# Input types that the page shows as a widget. All others are sockets.
WIDGET_TYPES = {"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO", "MARKDOWN", "IMAGEUPLOAD", "COLOR", "IMAGECOMPARE",
                "BOUNDING_BOX", "CHART", "GALLERIA", "PAINTER", "TEXTAREA", "CURVE", "RANGE", "BOUNDING_BOXES",
                "COLORS", "COMFY_DYNAMICCOMBO_V3"}
PLAIN_DEFAULTS = {"INT": 0, "FLOAT": 0, "BOOLEAN": False, "STRING": "", "TEXTAREA": "", "MARKDOWN": "",
                  "IMAGECOMPARE": ["", ""]}

# Nodes whose file name may ask for dates and for values of other nodes: %date:yyyy-MM-dd%, %KSampler.seed%.
SAVE_NODES = {"SaveImage", "SaveImageAdvanced", "SaveSVGNode", "SaveVideo", "SaveAnimatedWEBP", "SaveWEBM", "SaveAudio",
              "SaveAudioMP3", "SaveAudioOpus", "SaveAudioAdvanced", "SaveGLB", "Save3DAdvanced", "SaveGaussianSplat",
              "SavePointCloud", "SaveAnimatedPNG", "CLIPSave", "VAESave", "ModelSave", "LoraSave", "SaveLatent"}


@dataclass(eq=False)
class Widget:
    name: str
    type: str
    value: object
    sent: bool = True  # part of the prompt; the control of a seed is not
    dynamic_prompt: bool = False
    source: "Widget | None" = None  # a primitive's, which overwrites this one


@dataclass
class Slot:
    name: str
    type: str
    widget: str | None = None
    link: int | None = None


@dataclass
class Spec:
    """One declared input of a node, with its options."""

    name: str
    type: str
    options: dict = field(default_factory=dict)

    @classmethod
    def of(cls, name, declared):
        kind, options = declared[0], (declared[1] if len(declared) > 1 else None) or {}
        if isinstance(kind, list):  # the older way to declare a combo
            return cls(name, "COMBO", {**options, "options": kind})
        return cls(name, kind, options)

    @property
    def widget_type(self):
        kind = self.options.get("widgetType") or self.type
        return kind if kind in WIDGET_TYPES and not self.options.get("forceInput") else None

    @property
    def default(self):
        options = self.options.get("options") or []
        if self.type == "COMFY_DYNAMICCOMBO_V3":
            return options[0]["key"] if options else None
        if self.type == "COMBO":
            return self.options.get("default") or (options[0] if options else None)
        default = self.options.get("default")
        return PLAIN_DEFAULTS.get(self.type) if default is None else default


def specs_of(definition):
    """The inputs of a node in the page's order: as `input_order` lists them, then the rest."""
    declared = definition["input"]
    required, optional = declared.get("required") or {}, declared.get("optional") or {}
    named = [Spec.of(name, spec) for name, spec in [*required.items(), *optional.items()]]
    order = definition.get("input_order") or {}
    ranks = {name: i for i, name in enumerate([*order.get("required", []), *order.get("optional", [])])}
    named.sort(key=lambda spec: ranks.get(spec.name, len(ranks)))
    media = next((Spec.of(name, spec) for name, spec in required.items() if is_upload(Spec.of(name, spec))), None)
    return [*named, Spec("upload", "IMAGEUPLOAD", {"default": "image"})] if media else named


def is_upload(spec):
    flags = ("image_upload", "animated_image_upload", "video_upload")
    return spec.type == "COMBO" and any(spec.options.get(flag) for flag in flags)


def widgets_of(specs, saved):
    """The widgets of a node, filled from the list of saved values as far as that goes."""
    widgets = []
    if isinstance(saved, dict):  # some packs keep their values by name
        take = saved.get
    else:
        values = iter(without_forced_inputs(specs, saved))

        def take(_, default):
            return next(values, default)

    def add(spec):
        kind = spec.widget_type
        if kind is None:
            return
        value = take(spec.name, spec.default)
        if kind == "COMBO" and value is None:
            value = spec.default
        widgets.append(Widget(spec.name, kind, value, sent=kind != "IMAGEUPLOAD",
                              dynamic_prompt=spec.options.get("dynamicPrompts") is True))
        if kind == "COMFY_DYNAMICCOMBO_V3":
            for inner in option_specs(spec, value):
                add(inner)
        for name, default in controls(spec, kind):
            widgets.append(Widget(name, "CONTROL", take(name, default), sent=False))

    for spec in specs:
        add(spec)
    return widgets


def controls(spec, kind):
    """The extra widgets that change a value after each run. They hold a saved value but are not sent."""
    wanted = spec.options.get("control_after_generate")
    if wanted is None:
        wanted = kind == "INT" and spec.name in ("seed", "noise_seed")
    if not wanted or kind not in ("INT", "FLOAT", "COMBO"):
        return []
    name = wanted if isinstance(wanted, str) else "control_after_generate"
    control = (name, "fixed" if kind == "FLOAT" else "randomize")
    return [control, ("control_filter_list", "")] if kind == "COMBO" else [control]


def option_specs(spec, key):
    """The inputs that a dynamic combo shows for its chosen option."""
    chosen = next((option for option in spec.options.get("options", []) if option["key"] == key), None)
    if chosen is None:
        return []
    declared = {**(chosen["inputs"].get("required") or {}), **(chosen["inputs"].get("optional") or {})}
    return [Spec.of(f"{spec.name}.{name}", inner) for name, inner in declared.items()]


def without_forced_inputs(specs, saved):
    """Old pages kept a value for inputs that are sockets only; such a list is longer by exactly those."""
    marks = []
    for spec in specs:
        if spec.widget_type or spec.options.get("forceInput"):
            forced = bool(spec.options.get("forceInput"))
            marks += [forced, False] if spec.options.get("control_after_generate") else [forced]
    if len(marks) != len(saved):
        return saved
    return [value for value, forced in zip(saved, marks, strict=True) if not forced]


def slots_of(specs, widgets):
    """The input slots of a node: sockets first, then one for each widget, those of a dynamic combo behind it."""
    chosen = {widget.name: widget.value for widget in widgets}
    sockets, fields = [], []

    def add(spec, into):
        if spec.widget_type is None:
            into.append(Slot(spec.name, socket_type(spec)))
            return
        if not spec.options.get("socketless"):
            fields.append(Slot(spec.name, spec.type, widget=spec.name))
        if spec.type == "COMFY_DYNAMICCOMBO_V3":
            for inner in option_specs(spec, chosen.get(spec.name)):
                add(inner, fields)

    for spec in specs:
        if spec.type != "COMFY_AUTOGROW_V3":  # its slots are in the file, named <group>.<name>
            add(spec, sockets)
    return sockets + fields


def socket_type(spec):
    if spec.type == "COMFY_MATCHTYPE_V3":
        return spec.options["template"]["allowed_types"]
    return spec.type


def resolve_prompt(text):
    """Comments are dropped and each {a|b} becomes one of its choices, as the page does when a prompt is queued."""
    text = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text)
    result, i = "", 0
    while i < len(text):
        if text[i] == "\\":
            result, i = result + text[i:i + 2], i + 2
        elif text[i] == "{":
            choices, i = read_choices(text, i + 1)
            result += resolve_prompt(random.choice(choices))
        else:
            result, i = result + text[i], i + 1
    return re.sub(r"\\([{}|])", r"\1", result)


def read_choices(text, i):
    """The alternatives from behind an opening brace on, and the place behind the closing one."""
    choices, depth = [""], 0
    while i < len(text):
        char, i = text[i], i + 1
        if char == "\\":
            choices[-1] += text[i - 1:i + 1]
            i += 1
            continue
        if char == "}" and depth == 0:
            break
        if char == "|" and depth == 0:
            choices.append("")
            continue
        depth += {"{": 1, "}": -1}.get(char, 0)
        choices[-1] += char
    return choices, i


def fill_file_name(text, find_value):
    """%date:...% and %node.widget% in a file name. `find_value(node, widget)` returns None where there is no such."""
    def fill(match):
        node, dot, widget = match.group(1).partition(".")
        if match.group(1).startswith("date:"):
            return format_date(match.group(1)[5:], datetime.datetime.now())
        value = find_value(node, widget) if dot and "." not in widget else None
        return match.group(0) if value is None else re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", as_text(value))

    return re.sub(r"%([^%]+)%", fill, text)


def as_text(value):
    """As JavaScript writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def format_date(pattern, now):
    parts = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def fill(match):
        token = match.group(0)
        if token[0] == "y":
            return str(now.year)[-len(token):]
        return str(parts[token[0]]).rjust(len(token), "0")

    return re.sub(r"yyyy|yy|dd?|MM?|hh?|mm?|ss?", fill, pattern)
