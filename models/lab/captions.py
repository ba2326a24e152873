"""Captions of the lab's world: a fixed template whose parts may be left out, and its inverse."""

import re

from .portrait import FACTORS

POSITIONS = {"left": "on the left", "center": "in the center", "right": "on the right"}
HATS = {"no hat": "no hat", "beanie": "a beanie", "top hat": "a top hat", "crown": "a crown"}


def phrases(portrait, named=tuple(FACTORS)):
    """The caption's comma-separated parts, naming only the factors in `named`."""
    say = {name: getattr(portrait, name) if name in named else "" for name in FACTORS}
    person = f"a {say['style']} portrait of a {say['expression']} person"
    hair = f"{say['hair_style']} {say['hair_color']} hair" if say["hair_style"] or say["hair_color"] else ""
    backdrop = f"{say['pattern']} {say['background']} background" if say["pattern"] or say["background"] else ""
    parts = [
        person,
        POSITIONS.get(say["position"], ""),
        f"{say['skin']} skin" if say["skin"] else "",
        hair,
        say["glasses"],
        HATS.get(say["hat"], ""),
        f"{say['shirt']} shirt" if say["shirt"] else "",
        backdrop,
    ]
    return [" ".join(part.split()) for part in parts if part]


def caption(portrait, named=tuple(FACTORS)):
    """'a comic portrait of a happy person, on the left, dark skin, long blue hair, glasses, a crown, ...'"""
    return ", ".join(phrases(portrait, named))


def random_phrases(portrait, rng, words=()):
    """Training caption: half the time complete, otherwise each factor kept with a random probability.

    Sometimes in another order, without the leading phrase, or with foreign `words` between the phrases, so that
    prompts compose and unknown words are ignored.
    """
    keep = 1.0 if rng.random() < 0.5 else rng.random()
    parts = phrases(portrait, [name for name in FACTORS if rng.random() < keep])
    if rng.random() < 0.3:
        rng.shuffle(parts)
    if words and rng.random() < 0.15:
        parts.insert(rng.randrange(len(parts) + 1), " ".join(rng.choice(words) for _ in range(rng.randint(1, 4))))
    if keep < 1 and len(parts) > 1 and rng.random() < 0.2:
        parts = [part for part in parts if "person" not in part]
    return parts


def parse(text):
    """The factors a prompt names: {"hair_color": "blue", ...}. Words outside the world are skipped."""

    def one_of(name):
        return "(" + "|".join(FACTORS[name]) + ")"

    patterns = {
        "style": f"{one_of('style')} portrait",
        "expression": f"{one_of('expression')} person",
        "position": r"(?:on the|in the) " + one_of("position"),
        "skin": f"{one_of('skin')} skin",
        "hair_style": one_of("hair_style") + r"(?: \w+)? hair",
        "hair_color": one_of("hair_color") + " hair",
        "glasses": r"\b(no glasses|glasses)",
        "hat": r"\b(no hat|beanie|top hat|crown)",
        "shirt": one_of("shirt") + " shirt",
        "pattern": one_of("pattern") + r"(?: \w+)? background",
        "background": one_of("background") + " background",
    }
    found = {name: re.search(pattern, text.lower()) for name, pattern in patterns.items()}
    return {name: match.group(1) for name, match in found.items() if match}
