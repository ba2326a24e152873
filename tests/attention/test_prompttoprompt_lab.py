"""Prompt-to-Prompt's claims on the lab's trained models; tests/bench/lab_words.md has the figures for more settings."""

import pytest
from bench.lab_words import mean, words

SIZE = dict(portraits=16, steps=12)


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_a_swapped_hair_colour_keeps_the_rest_twice_as_well_as_another_prompt(which):
    """Of the factors that no prompt names a change of, at most half as many change; the face stays nearer too."""
    cases = [words(which, seed=seed, **SIZE) for seed in range(2)]
    columns = ("edited", "lost", "face", "PSNR")
    other = mean(cases, lambda c: c.sample(c.model, c.after), columns)
    edited = mean(cases, lambda c: c.edit(cross_replace=0.8, self_replace=0.8), columns)
    assert edited["lost"] <= 0.5 * other["lost"] and edited["face"] < 0.75 * other["face"], (edited, other)
    assert edited["PSNR"] > other["PSNR"] + 1.5 and edited["edited"] > 0.7, (edited, other)


def test_a_word_counts_as_much_as_it_weighs():
    """The reader's certainty of glasses rises with the weight of the word; at weight 1 the picture is the source."""
    cases = [words("unet", 8, 8, 0, weighed=True)]
    found = [mean(cases, lambda c, w=w: c.edit(weights=f"glasses: {w}", cross_replace=1.0), ("certainty", "PSNR"))
             for w in (-1.0, 0.0, 1.0)]
    certainty = [f["certainty"] for f in found]
    assert certainty[0] < 0.2 < certainty[1] - 0.3 and certainty[1] <= certainty[2] and certainty[2] > 0.9, certainty
    assert found[2]["PSNR"] > 60 > found[1]["PSNR"] > found[0]["PSNR"]
