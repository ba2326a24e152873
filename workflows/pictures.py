"""Makes the pictures of the shipped workflows anew: thumbnails, help pages, README.

    python workflows/pictures.py [NAME ...]

Runs each workflow as it is shipped; one row of the sheet per Save Image node, in the order of the graph.
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).absolute().parent
ROOT = HERE.parent
sys.path += [str(HERE), str(ROOT / "tests")]

import host  # noqa: E402

README = ["guidance-pag", "guidance-apg", "guidance-cfgpp"]
EDITING = ["attention-prompttoprompt", "attention-masactrl", "attention-fluxspace", "hspace-injectfusion"]


def rows_of(name):
    """Rows of PIL images that a workflow saves."""
    import json

    from headless.convert import convert
    from headless.local import Local
    from PIL import Image

    workflow = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        local = Local(folder)
        prompt = convert(workflow, local.definition)
        shown = local.run(prompt, None, lambda *progress: None)
        saving = sorted((n for n in prompt if prompt[n]["class_type"] == "SaveImage"), key=int)
        return [[Image.open(local.fetch(item)).convert("RGB") for item in shown[n]["images"]] for n in saving]


def methods():
    """{workflow: id of the node of the method it shows}."""
    from steer.nodes import discover

    pages = {}
    for node in discover():
        room, method = node.__module__.split(".")[-2:]
        if room != "lab":
            pages.setdefault(f"{room}-{method}", node.define_schema().node_id)
    return pages


def page(node):
    return (ROOT / "nodes" / "help" / "docs" / node / "en.md").read_text(encoding="utf-8")


def sheet(rows, gap=4):
    from PIL import Image

    width, height = (side + gap for side in rows[0][0].size)
    out = Image.new("RGB", (width * max(map(len, rows)) - gap, height * len(rows) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            out.paste(picture, (x * width, y * height))
    return out


def main():
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.json"))
    host.enter()
    made = {}
    for name in names:
        rows = made[name] = rows_of(name)
        pages = methods()  # the pack is loaded only now
        targets = [HERE / f"{name}.jpg"]
        if name in pages and "off-on.jpg" in page(pages[name]):
            rows = rows[:2]
            targets.append(ROOT / "nodes" / "help" / "docs" / pages[name] / "off-on.jpg")
        for path in targets:
            sheet(rows).save(path, quality=88)
            print(path.relative_to(ROOT))
    for names, file in ((README, "steer.jpg"), (EDITING, "editing.jpg")):
        if set(names) <= set(made):
            pairs = [made[name][0][:4] + made[name][1][:4] for name in names]  # off, then on
            path = ROOT / "nodes" / "help" / file
            sheet(pairs).save(path, quality=88)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
