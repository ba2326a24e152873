"""Tables of figures in a Markdown file, of which single ones can be made anew."""


def head(columns):
    return [f"| setting | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]


def read(path):
    """{title: text} of the tables in the file."""
    if not path.is_file():
        return {}
    sections = path.read_text(encoding="utf-8").split("\n## ")[1:]
    return {title: text.strip() for title, _, text in (section.partition("\n") for section in sections)}


def write(path, intro, titles, made):
    """Those of `titles` that are in `made`, {title: text}, in this order."""
    sections = (f"\n## {title}\n\n{made[title]}\n" for title in titles if title in made)
    path.write_text(f"{intro}\n" + "".join(sections), encoding="utf-8")
