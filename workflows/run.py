"""Runs a workflow without the page.

    python workflows/run.py guidance-pag                      a workflow of this folder, by name
    python workflows/run.py my.json --set "KSampler.cfg=4"    any workflow file, in the page's or the API format
    python workflows/run.py guidance-pag --server 127.0.0.1:8188    on a ComfyUI that is running

Without --server it runs in this process, in a ComfyUI that is set up first where there is none. Pictures carry the
workflow as ComfyUI writes it. Exit codes: 0 done, 1 a node failed or the run was interrupted, 2 the command line is
wrong (no such workflow, node, input or value), 3 the host cannot run this workflow, 4 the server does not answer.
"""

import argparse
import importlib.util
import json
import logging
import sys
from pathlib import Path

HERE = Path(__file__).absolute().parent
sys.path += [str(HERE), str(HERE.parent / "tests")]

import host  # noqa: E402

FAILED, USAGE, UNFIT, UNREACHABLE = 1, 2, 3, 4


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", nargs="?", help="name of a workflow in this folder, or path of a file")
    parser.add_argument("--set", action="append", default=[], metavar='"NODE.INPUT=VALUE"',
                        help="change an input; NODE is a title, a type or an id. May be repeated")
    parser.add_argument("--seed", type=int, help="set every seed")
    parser.add_argument("--steps", type=int, help="set every number of steps")
    parser.add_argument("--out", type=Path, default=Path("output"), metavar="DIR",
                        help="where files go (%(default)s)")
    parser.add_argument("--server", metavar="URL", help="run on this ComfyUI instead of in this process")
    parser.add_argument("--list", action="store_true", help="list the workflows of this folder")
    options = parser.parse_args()
    if not options.workflow and not options.list:
        parser.error("name a workflow, or use --list")
    return options


def workflows():
    return sorted(path.stem for path in HERE.glob("*.json"))


def load(name):
    path = HERE / f"{name}.json" if name in workflows() else Path(name)
    if not path.is_file():
        known = ", ".join(workflows())
        raise SystemExit(fail(f"There is no workflow {name!r}, neither a file nor one of: {known}.", USAGE))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(fail(f"{path} is not JSON: {error}", USAGE)) from None


def fail(message, code):
    print(message, file=sys.stderr)
    return code


def main():
    options = arguments()
    if options.list:
        print("\n".join(workflows()))
        return 0
    raw = load(options.workflow)
    if not options.server or importlib.util.find_spec("aiohttp") is None:
        host.enter()
    logging.getLogger().setLevel(logging.ERROR)  # the host warns of things that only its page is concerned with

    from headless import edit
    from headless.graph import ConversionError
    from headless.run_error import RunError, Unreachable

    try:
        if options.server:
            from headless.remote import Remote

            runner = Remote(options.server, options.out)
        else:
            from headless.local import Local

            runner = Local(options.out)
        document = edit.read(raw, runner.definition)
        for text in options.set:
            document = edit.apply_set(document, text)
        for option, names in (("seed", ("seed", "noise_seed")), ("steps", ("steps",))):
            value = getattr(options, option)
            if value is not None:
                document = edit.apply_everywhere(document, f"--{option}", names, value)
        return run(runner, document)
    except edit.EditError as error:
        return fail(str(error), USAGE)
    except ConversionError as error:
        return fail(str(error), UNFIT)
    except RunError as error:
        return fail(str(error), UNFIT if error.before_start else FAILED)
    except Unreachable as error:
        return fail(str(error), UNREACHABLE)
    except KeyboardInterrupt:
        return fail("Interrupted.", FAILED)


def run(runner, document):
    from headless.edit import title
    from headless.progress import Progress

    progress = Progress()

    def show(node_id, value, total):
        progress(title(document, node_id) if node_id in document.prompt else "working", value, total)

    try:
        shown = runner.run(document.prompt, document.raw, show)
    finally:
        progress.finish()
    for node_id, output in shown.items():
        for text in output.get("text") or []:
            print(f"{title(document, node_id)}: {text}" if node_id in document.prompt else text)
    items = [item for output in shown.values() for values in output.values() for item in values]
    paths = [runner.fetch(item) for item in items if isinstance(item, dict) and "filename" in item]
    for path in filter(None, paths):
        print(path)
    if not any(paths):
        print("Nothing was saved: no node of this workflow that ran saves a file.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
