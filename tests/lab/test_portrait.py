from dataclasses import replace

import numpy as np
import pytest
from steer.models.lab.captions import caption, parse, phrases
from steer.models.lab.portrait import FACTORS, GEOMETRY, Portrait, draw, draw_masks


def test_same_factors_same_picture():
    one, two = Portrait.from_seed(7), Portrait.from_seed(7)
    assert one == two
    assert np.array_equal(draw(one), draw(two))
    assert draw(one).shape == (128, 128, 3) and draw(one).dtype == np.uint8


@pytest.mark.parametrize("name", FACTORS)
def test_a_fixed_factor_moves_no_other(name):
    for seed in range(20):
        free = Portrait.from_seed(seed)
        for value in FACTORS[name]:
            assert Portrait.from_seed(seed, **{name: value}) == replace(free, **{name: value})


@pytest.mark.parametrize("name", FACTORS)
def test_every_value_of_a_factor_shows(name):
    base = Portrait.from_seed(11, hat="no hat", pattern="striped")
    pictures = [draw(replace(base, **{name: value})).astype(float) for value in FACTORS[name]]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (np.abs(a - b).max(-1) > 40).mean() > 0.01


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_shows(name):
    low, high = (draw(Portrait(**{name: value})).astype(float) for value in (-1.0, 1.0))
    assert np.abs(low - high).max() > 50


def test_a_wrong_value_is_named():
    with pytest.raises(ValueError, match="hat='fez' is not one of no hat, beanie, top hat, crown"):
        Portrait(hat="fez")


def test_masks_are_exact_where_a_colour_changes():
    """Recolouring the hair changes pixels inside the hair mask only, and the background likewise."""
    for seed in range(30):
        p = Portrait.from_seed(seed, style="flat")
        masks = draw_masks(p)
        for name, value, mask in (("hair_color", "green", "hair"), ("background", "white", "background")):
            changed = np.abs(draw(p).astype(int) - draw(replace(p, **{name: value}))).max(-1) > 0
            assert not (changed & (masks[mask] == 0)).any()
        assert (masks["hair"] <= masks["head"] + 1e-6).all()
        assert (masks["head"] + masks["background"] <= 1.01).all()
        assert 0.1 < masks["head"].mean() < 0.6


def test_identity_is_geometry_and_hair_style():
    one, other = Portrait.from_seed(1), Portrait.from_seed(2)
    same = one.with_identity(other)
    assert same.geometry == other.geometry and same.hair_style == other.hair_style
    assert same.hair_color == one.hair_color and same.expression == one.expression


def test_captions_and_their_inverse():
    for seed in range(50):
        p = Portrait.from_seed(seed)
        assert parse(caption(p)) == {name: getattr(p, name) for name in FACTORS}
        for name in FACTORS:
            assert parse(caption(p, [name])) == {name: getattr(p, name)}
    assert phrases(Portrait(), []) == ["a portrait of a person"]
    assert parse("masterpiece, best quality") == {}
