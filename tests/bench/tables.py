"""Tables of figures in a Markdown file, of which single ones can be made anew, also by two commands side by side."""

import argparse
import os


def arguments(doc, settings=False, **defaults):
    """({size: whole number, "bf16": bool}, numbers of the tables to make) of a bench's command line.

    settings: single rows can be asked for; then the sizes have the beginnings of their names, `rows` leaves others out.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true", help="autocast: twice as fast where a CPU has it, fine to 40 dB")
    parser.add_argument("--tables", type=int, nargs="+", help="numbers of the tables to make anew; all by default")
    if settings:
        help = "beginnings of the rows to make anew, the others stay as they are"
        parser.add_argument("--settings", nargs="+", default=(), help=help)
    size = vars(parser.parse_args())
    return size, size.pop("tables")


def make(path, intro, tables, size, numbers=None, form=".3f"):
    """Makes those `numbers` from 1 of `tables`, all by default, and puts them into the file one after another.

    tables: [(title, columns, rows)], where rows(**size) yields (name, {column: number or text}).
    Returns {number: what rows yielded}.
    """
    import torch

    titles, found = [title for title, _, _ in tables], {}
    size = dict(size)
    bf16 = size.pop("bf16")
    settings = size.get("settings", ())
    sizes = " ".join(f"--{name} {value}" for name, value in size.items() if name != "settings") + " --bf16" * bf16
    asked = " ".join([" --settings", *(f'"{name}"' for name in settings)]) if settings else ""
    for number, (title, columns, rows) in enumerate(tables, 1):
        if numbers and number not in numbers:
            continue
        found[number] = []
        lines = [f"| setting | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for name, figures in rows(**size):
                cells = (figures[column] for column in columns)
                cells = (cell if isinstance(cell, str) else f"{cell:{form}}" for cell in cells)
                lines.append(f"| {name} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
                found[number].append((name, figures))
        by = f"`{path.stem}.py {sizes} --tables {number}{asked}`"
        old = read(path).get(title, "") if asked else ""
        write(path, intro, titles, {title: merged(old, by, lines)})
    return found


def merged(old, by, lines):
    """The text of a table made by the command `by`; in `old`, where there is one, the rows of the same name give way
    to it, and new ones come last."""
    if not old:
        return "\n".join([by, "", *lines])
    before, _, *rows = old.splitlines()
    rows = {row.split("|")[1]: row for row in (*rows, *lines)}
    return "\n".join([before if by in before else f"{before}; {by}", "", *rows.values()])


def read(path):
    """{title: text} of the tables in the file."""
    if not path.is_file():
        return {}
    sections = path.read_text(encoding="utf-8").split("\n## ")[1:]
    return {title: text.strip() for title, _, text in (section.partition("\n") for section in sections)}


def write(path, intro, titles, made):
    """Puts `made`, {title: text}, beside what the file holds by now, in the order of `titles`, then what is not among
    them: a table that a newer state of the command made."""
    made = {**read(path), **made}
    order = [*(title for title in titles if title in made), *(title for title in made if title not in titles)]
    sections = (f"\n## {title}\n\n{made[title]}\n" for title in order)
    part = path.with_name(f"{path.name}.{os.getpid()}")  # nobody reads half a file
    part.write_text(f"{intro}\n" + "".join(sections), encoding="utf-8")
    os.replace(part, path)
