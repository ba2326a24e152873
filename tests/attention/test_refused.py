"""What every method of the room refuses before the first step: networks that it cannot look into, and another that
replaces the same."""

from itertools import combinations

import pytest
import torch
import toy
from attention import texts
from attention.by_hand import path
from steer.patches.attention import (
    freecontrol,
    kvreuse,
    masactrl,
    plugandplay,
    prompttoprompt,
    styleinjection,
    unifiedattention,
    wordmask,
)
from steer.patches.shared.schedule import Schedule

WHERE, ALWAYS, WORDS = "output", Schedule(), ("a happy person", "a sad person")


def mask():
    made = torch.zeros(1, 16, 16)
    made[:, 4:12, 4:12] = 1.0
    return made


SIDED = {  # what replaces queries, keys or values beside a source
    "SteerMasaCtrl": lambda m, p, window=ALWAYS: masactrl.apply(m, p, 1.0, WHERE, window),
    "SteerKVReuse": lambda m, p, window=ALWAYS: kvreuse.apply(m, p, mask(), 0.0, WHERE, window),
    "SteerPlugAndPlay": lambda m, p, window=ALWAYS: plugandplay.apply(m, p, WHERE, window, "auto", Schedule(0.0, 0.0)),
    "SteerStyleInjection": lambda m, p, window=ALWAYS: styleinjection.apply(m, p, p, 0.5, 1.5, WHERE, window)[0],
    "SteerFreeControl": lambda m, p, window=ALWAYS: freecontrol.apply(m, p, 1.0, 8, WHERE, "subspace", window),
    "SteerPromptToPrompt": lambda m, p, window=ALWAYS: prompttoprompt.apply(
        m, texts.clip(), p, *WORDS, cross_replace=0.0, self_replace=1.0, layers=WHERE)[0],
}
ALL = {
    **SIDED,
    "SteerUnifiedAttention": lambda m, p: unifiedattention.apply(m, 1.0, 0.0, 0.0, "auto", ALWAYS),
    "SteerWordMask": lambda m, p: wordmask.mask(m, texts.clip(), WORDS[0], "person", p.source),
}


@pytest.mark.parametrize("node", ALL)
def test_a_network_without_an_adapter(node):
    model = toy.gaussian()
    with pytest.raises(ValueError, match=rf"{node}: cannot act on Gaussian \(.*\); supported: UNet .*, Flux"):
        ALL[node](model, path("unet", model))


@pytest.mark.parametrize("first, second", list(combinations(SIDED, 2)))
def test_two_that_replace_the_same_in_one_layer(first, second):
    """All of them replace keys, which has no meaning twice; in windows that do not overlap they follow each other."""
    model = toy.model()
    trajectory = path("unet", model)
    both = SIDED[second](SIDED[first](model, trajectory), trajectory)
    words = "both replace the .*keys.* in output.*; give them other layers, or windows"
    with toy.count_forwards(model) as count, pytest.raises(ValueError, match=words) as raised:
        toy.sample(both)
    assert count.calls == 0 and first in str(raised.value) and second in str(raised.value)


def test_one_after_the_other_is_both():
    model = toy.model()
    trajectory = path("unet", model)
    early, late = Schedule(0.0, 0.5), Schedule(0.5, 1.0)
    first = SIDED["SteerPlugAndPlay"](model, trajectory, early)
    both = SIDED["SteerMasaCtrl"](first, trajectory, late)
    outs = [toy.sample(each) for each in (first, SIDED["SteerMasaCtrl"](model, trajectory, late), both)]
    assert not torch.allclose(outs[0], outs[2], atol=1e-2) and not torch.allclose(outs[1], outs[2], atol=1e-2)
