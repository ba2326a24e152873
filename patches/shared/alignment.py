"""Which column of one prompt's conditioning stands for which of another's, for Prompt-to-Prompt (Hertz et al. 2022,
arXiv 2208.01626): words replaced, words put in or left out, words in another order."""

from dataclasses import dataclass

import torch

from .words import Prompt, listed

OPERATIONS = ("refine", "replace", "reorder")


@dataclass(frozen=True, eq=False)
class Alignment:
    """M: [source columns, target columns], the share of a source column that goes to each of the target's.
    alpha: [target columns], 1 where the target's column has a counterpart, 0 where it is new."""

    source: Prompt
    target: Prompt
    M: torch.Tensor
    alpha: torch.Tensor

    def __str__(self):
        """Each word of the target with the words of the source that it gets its attention from; then what is left."""
        theirs, mine = self.source.streams[0].words, self.target.streams[0].words
        lines, used = [], set()
        for n, (text, columns) in enumerate(mine):
            rows = self.M[:, list(columns)].any(1)
            found = [i for i, (_, source) in enumerate(theirs) if rows[list(source)].any()]
            used.update(found)
            origin = ", ".join(f"#{i + 1} {theirs[i][0]}" for i in found) or "(new)"
            lines.append(f"#{n + 1} {text} <- {origin}")
        left = [f"#{i + 1} {text}" for i, (text, _) in enumerate(theirs) if i not in used]
        return "\n".join(lines + ([f"left out: {', '.join(left)}"] if left else []))


def align(source, target, operation, pairs=""):
    """The `Alignment` of two `Prompt`s by one of OPERATIONS.

    refine: tokens that both have, in the same order; the target's others are new.
    replace: word by word, so both need as many; ValueError otherwise.
    reorder: equal words, wherever they are, and those that `pairs` names: "source word: target word, ...".
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} is unknown; choose one of {', '.join(OPERATIONS)}.")
    if pairs.strip() and operation != "reorder":
        raise ValueError(f'word_map is for the operation "reorder", and the operation is "{operation}"; empty it.')
    if len(source.streams) != len(target.streams):
        raise ValueError("the two prompts come from different text encoders; encode both by the same CLIP.")
    M, alpha = torch.zeros(source.columns, target.columns), torch.zeros(target.columns)
    named = _pairs(source, target, pairs) if operation == "reorder" else [{}] * len(source.streams)
    for s, t, by_name in zip(source.streams, target.streams, named, strict=True):
        if operation == "refine":
            _match(M, alpha, s.tokens, t.tokens)
        elif operation == "replace":
            if len(s.words) != len(t.words):
                raise ValueError(
                    f'the prompts have {len(s.words)} and {len(t.words)} words, and "replace" goes word by word; take '
                    f'"refine", or as many words: "{source.text.strip()}" and "{target.text.strip()}".'
                )
            for (_, mine), (_, its) in zip(t.words, s.words, strict=True):
                _span(M, alpha, its, mine)
            for its, mine in zip(s.gaps(), t.gaps(), strict=True):
                if len(its) == len(mine):
                    _span(M, alpha, [c for c, _ in its], [c for c, _ in mine])
                else:
                    _match(M, alpha, its, mine)
        else:
            _match(M, alpha, *([pair for gap in stream.gaps() for pair in gap] for stream in (s, t)))
            for n, i in {**_equal(s, t), **by_name}.items():
                _span(M, alpha, s.words[i][1], t.words[n][1])
        for its, mine in zip(reversed(s.padding), reversed(t.padding), strict=False):
            _padding(M, alpha, its, mine)
    return Alignment(source, target, M, alpha)


def _span(M, alpha, source, target):
    """Columns of one word: in pairs where there are as many, otherwise the source's in equal shares to all."""
    if not source or not target:
        return
    alpha[list(target)] = 1.0
    if len(source) == len(target):
        M[list(source), list(target)] = 1.0
    else:
        M[torch.tensor(source)[:, None], torch.tensor(target)] = 1.0 / len(target)


def _padding(M, alpha, source, target):
    """Place by place from the end, as in the paper's code. Where one has padding and the other a token, the first of
    the other's padding serves, so that what was padding's stays padding's."""
    (s, s_end), (t, t_end) = source, target
    if s == s_end or t == t_end:
        return
    alpha[t:t_end] = 1.0
    for i in range(s, s_end):
        M[i, max(i - s_end + t_end, t)] = 1.0
    alone = (t_end - t) - (s_end - s)
    if alone > 0:
        M[s, t : t + alone + 1] = 1.0 / (alone + 1)


def _match(M, alpha, source, target):
    """Pairs equal tokens of two sequences [(column, token)] in order, as many as can be: Needleman-Wunsch with gap 0,
    match 1, mismatch -1; of equal scores the new token comes before the dropped one, and that before the pair."""
    n, m = len(source), len(target)
    score = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        above, row, token = score[i - 1], score[i], source[i - 1][1]
        for j in range(1, m + 1):
            row[j] = max(row[j - 1], above[j], above[j - 1] + (1 if token == target[j - 1][1] else -1))
    i, j = n, m
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            M[source[i][0], target[j][0]] = 1.0
            alpha[target[j][0]] = 1.0


def _equal(source, target):
    """{number of a target word: number of the source's}: the k-th of equal words to the k-th."""
    found = {}
    for text in {text for text, _ in target.words}:
        its, mine = ([i for i, (word, _) in enumerate(s.words) if word == text] for s in (source, target))
        found.update(zip(mine, its, strict=False))
    return found


def _pairs(source, target, text):
    """For each stream {number of a target word: number of the source's} from "source: target, ..."."""
    found = [{} for _ in source.streams]
    for part in listed(text):
        left, colon, right = part.partition(":")
        if not colon:
            raise ValueError(f'word_map "{part}" cannot be read; write for example "blue: red, #3: #5".')
        for places, its, mine in zip(found, source.places(left), target.places(right), strict=True):
            if len(its) != len(mine) or any(len(a) != len(b) for a, b in zip(its, mine, strict=True)):
                raise ValueError(
                    f'word_map "{part}": the prompts have it {len(its)} and {len(mine)} times, or in another '
                    'number of words; name single words by number ("#3: #5").'
                )
            for a, b in zip(its, mine, strict=True):
                places.update(zip(b, a, strict=True))
    return found
