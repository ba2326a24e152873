"""Pictures in place of words of a CONDITIONING: the columns that are fused, and when."""

def fused(conditioning, columns, ids, adapter):
    """The CONDITIONING with its `columns` fused with `ids` [number of columns, width], one each, by a `Fuser`."""
    made = []
    for cond, options in conditioning:
        if cond.shape[-1] != adapter.width:
            raise ValueError(
                f"{adapter.name} is for a text of width {adapter.width}, and this text encoder makes {cond.shape[-1]}; "
                "take the text encoder of the model that it is made for."
            )
        new, rows = cond.clone(), len(cond)
        text = cond[:, list(columns)].flatten(0, 1)
        new[:, list(columns)] = adapter.fuse(text, ids.repeat(rows, 1)).unflatten(0, (rows, -1)).to(cond)
        made.append([new, options])
    return made


def delayed(before, after, percent):
    """`before` for the first `percent` of the sampling range (0 to 1), `after` for the rest."""
    if percent <= 0.0:
        return after
    if percent >= 1.0:
        return before
    return [*_within(before, 0.0, percent), *_within(after, percent, 1.0)]


def _within(conditioning, start, end):
    return [[cond, {**options, "start_percent": start, "end_percent": end}] for cond, options in conditioning]


def embedded(adapter, images, face=None):
    """What a `Fuser` makes of images [n, h, w, 3] and, where it takes one, the `Face` in each: [n * tokens, width]."""
    if not adapter.face:
        return adapter.embed(images).flatten(0, 1)
    if face is None:
        raise ValueError(f"{adapter.name} takes the face's embedding too: wire face.")
    if face.embedding.shape[-1] != adapter.face:
        raise ValueError(
            f"{adapter.name} takes face embeddings of width {adapter.face}, and this one has "
            f"{face.embedding.shape[-1]}; take the recogniser it was trained with (insightface)."
        )
    if len(face.embedding) != len(images):
        raise ValueError(f"there are {len(images)} pictures and {len(face.embedding)} faces; give one face for each.")
    return adapter.embed(images, face.embedding.float()).flatten(0, 1)


def marked(clip, text, trigger, count):
    """(tokens, columns) of a prompt for the host's text encoder: without the trigger, and with the token before it
    `count` times, in these columns.

    The trigger is found by its tokens, in each text encoder; weights and embeddings stay with their tokens. ValueError
    unless it is there once, after a word.
    """
    sought, made, places = clip.tokenize(trigger, return_word_ids=True), {}, set()
    for name, chunks in clip.tokenize(text, return_word_ids=True).items():
        pieces, mark = ([piece for chunk in c for piece in chunk if piece[2]] for c in (chunks, sought[name]))
        at = _place(pieces, mark, text, trigger)
        pieces = pieces[: at - 1] + pieces[at - 1 : at] * count + pieces[at + len(mark) :]
        made[name], column = _chunks(getattr(clip.tokenizer, f"clip_{name}", None), pieces)
        places.add(tuple(column(i) for i in range(at - 1, at - 1 + count)))
    if len(places) != 1:
        raise ValueError("its text encoders do not cut the prompt alike; use a text encoder of SD1.x or SDXL.")
    return made, places.pop()


def _place(pieces, mark, text, trigger):
    ids = [token if isinstance(token, int) else None for token, *_ in pieces]
    mark = [token for token, *_ in mark]
    found = [i for i in range(len(ids)) if mark and ids[i : i + len(mark)] == mark]
    if len(found) == 1 and found[0]:
        return found[0]
    if len(found) > 1:
        what = f"is {len(found)} times in the prompt; write it once,"
    else:
        what = "begins the prompt; write it" if found else "is not in the prompt; write it"
    example = f'after the word for the person, as in "a woman {trigger}"'
    raise ValueError(f'the trigger "{trigger}" {what} {example}: "{text.strip()}".')


def _chunks(tokenizer, pieces):
    """(pieces of a prompt in chunks as the host cuts them, number of a piece -> its column)."""
    ends = getattr(tokenizer, "start_token", None), getattr(tokenizer, "end_token", None)
    if None in ends or not tokenizer.pad_to_max_length:
        raise ValueError("its text encoder is not CLIP; use a text encoder of SD1.x or SDXL.")
    (start, end), length = (((token, 1.0, 0),) for token in ends), tokenizer.max_length
    inner, made = length - 2, []
    for i in range(0, max(len(pieces), 1), inner):
        chunk = [*start, *pieces[i : i + inner], *end]
        made.append(chunk + [(tokenizer.pad_token, 1.0, 0)] * (length - len(chunk)))
    return made, lambda i: i // inner * length + 1 + i % inner
