"""Words of a prompt and the columns of its conditioning, as the model's own tokenizer cuts it.

A name is a word or several ("top hat"), which stands for each place where the prompt has it, or "#3", the third word.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from numbers import Integral

import torch

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
CLIP = ("l", "g", "h")  # encoders whose outputs stand beside each other in the same columns


@dataclass(frozen=True)
class Stream:
    """The columns of one text encoder.

    tokens: [(column, token)] in order, without padding.
    padding: [(first, last)] columns of padding, one pair for each piece of 77 tokens or so, in order.
    words: [(word in lower case, its columns)].
    """

    tokens: tuple
    padding: tuple
    words: tuple

    def find(self, names):
        """Numbers of the words at each place where the prompt has the words `names`."""
        texts, n = [text for text, _ in self.words], len(names)
        return [range(i, i + n) for i in range(len(texts) - n + 1) if texts[i : i + n] == names]

    def gaps(self):
        """Columns of what is neither word nor padding (start, end, punctuation), by the number of words before."""
        firsts, taken = [columns[0] for _, columns in self.words], {c for _, columns in self.words for c in columns}
        gaps = [[] for _ in range(len(firsts) + 1)]
        for column, token in self.tokens:
            if column not in taken:
                gaps[bisect_left(firsts, column)].append((column, token))
        return gaps


@dataclass(frozen=True)
class Prompt:
    """A prompt as its conditioning has it. columns: length of the conditioning; streams: its encoders, in order."""

    text: str
    columns: int
    streams: tuple[Stream, ...]

    @property
    def words(self):
        return [text for text, _ in self.streams[0].words]

    def search(self, name):
        """For each stream the places of `name`, each a range of numbers of words."""
        if number := re.fullmatch(r"\s*#(\d+)\s*", name):
            i = int(number[1]) - 1
            return [[range(i, i + 1)] if 0 <= i < len(s.words) else [] for s in self.streams]
        words = [w.lower() for w in WORD.findall(name)]
        return [s.find(words) if words else [] for s in self.streams]

    def places(self, name):
        """The same; ValueError, with the words there are, where the prompt does not have it."""
        found = self.search(name)
        if not all(found):
            have = ", ".join(dict.fromkeys(self.words)) or "no words"
            raise ValueError(f'"{name.strip()}" is not in the prompt "{self.text.strip()}", which has: {have}.')
        return found

    def find(self, names):
        """Columns of all words that `names` (commas between them) stand for; () where it is empty."""
        columns = set()
        for name in listed(names):
            for stream, places in zip(self.streams, self.places(name), strict=True):
                columns.update(c for place in places for i in place for c in stream.words[i][1])
        return tuple(sorted(columns))

    def weights(self, text):
        """A weight for each column, [columns], from "glasses: 1.5, hat: -0.5"; 1 where nothing is said."""
        weights = torch.ones(self.columns)
        for part in listed(text):
            name, _, value = part.rpartition(":")
            try:
                weight = float(value)
            except ValueError:
                weight = float("nan")
            if not name or not abs(weight) < float("inf"):
                raise ValueError(f'weight "{part}" cannot be read; write it as in "glasses: 1.5, hat: -0.5".')
            weights[list(self.find(name))] = weight
        return weights


def listed(text):
    """What stands between commas or line breaks."""
    return [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]


def encode(clip, text):
    """(CONDITIONING, `Prompt`) of a text."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return conditioning, read(clip, text, conditioning[0][0].shape[1])


def read(clip, text, columns):
    """The `Prompt` of a text whose conditioning from `clip` has so many columns.

    ValueError where it cannot be told which column is which token.
    """
    encoders = {
        name: chunks
        for name, chunks in clip.tokenize(text, return_word_ids=True).items()
        if chunks and _part(getattr(clip, "cond_stage_model", None), name, True) is not None  # SD3 may lack some
    }
    nothing = clip.tokenize("", return_word_ids=True)
    length = {name: sum(map(len, chunks)) for name, chunks in encoders.items()}
    beside = [name for name in CLIP if name in encoders][:1]
    after = [name for name in encoders if name not in CLIP]
    for names in (after[:1], beside + after[:1], beside):  # Flux and the like; SD3; SD1.x, SD2, SDXL
        if names and sum(length[name] for name in names) == columns:
            break
    else:
        names = after[:1]  # a template was dropped where it begins, as for Qwen-Image
        if not names or length[names[0]] < columns:
            counts = ", ".join(f"{name} {n}" for name, n in length.items())
            raise ValueError(
                f"cannot tell which of the {columns} columns of this text encoder's conditioning belong to which word "
                f"(tokens: {counts}); use a text encoder of SD1.x, SD2, SDXL, SD3, Flux, Lumina, Qwen-Image or Wan."
            )
    streams, first = [], min(0, columns - sum(length[name] for name in names))
    for name in names:
        streams.append(_stream(_part(clip.tokenizer, name), encoders[name], nothing[name], first))
        first += length[name]
    if first != columns or any(columns_ and columns_[0] < 0 for s in streams for _, columns_ in s.words):
        raise ValueError(f"the prompt is longer than its conditioning of {columns} columns; shorten it.")
    return Prompt(text, columns, tuple(streams))


def _part(whole, name, default=None):
    """What a tokenizer or text model of several encoders has for the one named."""
    return getattr(whole, name, getattr(whole, f"clip_{name}", default))


def _stream(tokenizer, chunks, nothing, first):
    """chunks: [[(token, weight, number)]], number 0 for what is no text; nothing: the same of an empty prompt."""
    mine, template = ([token for chunk in c for token, _, n in chunk if n] for c in (chunks, nothing))
    pairs = enumerate(zip(mine, template, strict=False))
    before = next((i for i, (a, b) in pairs if not isinstance(a, Integral) or a != b), len(template))
    after = len(template) - before  # of the template's tokens, those that follow the prompt
    tokens, padding, text, column = [], [], [], first
    for chunk in chunks:
        start = 0 if tokenizer.start_token is not None else -1
        last = max((i for i, (_, _, n) in enumerate(chunk) if n), default=start)
        filled = min(last + 1 + (tokenizer.end_token is not None), len(chunk))
        for i, (token, _, number) in enumerate(chunk[:filled], column):
            if i >= 0:
                tokens.append((i, token if isinstance(token, Integral) else f"embedding {i}"))
            if number:
                text.append((i, token, number))
        padding.append((max(column + filled, 0), column + len(chunk)))
        column += len(chunk)
    return Stream(tuple(tokens), tuple(padding), _words(tokenizer, text[before : len(text) - after]))


def _words(tokenizer, text):
    """((word, columns), ...) of [(column, token, number)]; an embedding is the word "embedding"."""
    spiece = any(piece.startswith("\u2581") for piece in tokenizer.inv_vocab.values())
    surface, owners, previous, waiting = bytearray(), [], None, ()  # what tokens say, the columns of each byte
    for column, token, number in text:
        if isinstance(token, Integral):
            piece = _bytes(tokenizer.inv_vocab.get(token, ""), spiece)
        elif number == previous:  # the next vector of an embedding
            owners[-1] += (column,)
            continue
        else:
            piece = b"embedding"
        if number != previous:  # a part with a weight of its own begins a word
            piece, waiting = b" " + piece, ()
        surface += piece
        owners += [(*waiting, column)] * len(piece)
        waiting = (*waiting, column) if spiece and not piece.strip() else ()  # a space alone goes with what follows
        previous = number
    words, readable, at = [], surface.decode("utf-8", "surrogateescape"), [0]
    for letter in readable:
        at.append(at[-1] + len(letter.encode("utf-8", "surrogateescape")))
    for found in WORD.finditer(readable):
        columns = {c for owner in owners[at[found.start()] : at[found.end()]] for c in owner}
        words.append((found[0].lower(), tuple(sorted(columns))))
    return tuple(words)


def _bytes(piece, spiece):
    """A piece of the vocabulary as UTF-8: SentencePiece's, or one of byte-pair encoding (GPT, CLIP)."""
    if spiece:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()
    ends = piece.endswith("</w>")
    letters = _letters()
    return bytes(letters.get(letter, 0x20) for letter in piece.removesuffix("</w>")) + b" " * ends


@cache
def _letters():
    """The letters by which byte-pair encoding writes bytes: printable ones are themselves, others follow U+0100."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in itself]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}
