"""The claims of the editing methods on the lab's trained models, with margins far from the figures' spread.

tests/bench/lab_inversion_edit.md has the figures for more portraits, seeds and settings.
"""

import pytest
from bench.lab_inversion_edit import case, editfriendly, flowedit, rfinversion, same, sdedit


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_flowedit_keeps_more_for_the_same_edit(which):
    """In three quarters of the schedule both edit nearly all portraits; only FlowEdit keeps the face, and comes nearer
    to the truth."""
    lab, steps = case(which, 4), 12
    theirs = lab.figures([sdedit(lab, steps, steps * 3 // 4, 0)])
    ours = lab.figures([flowedit(lab, steps, steps * 3 // 4, 0)])
    assert ours["edited"] >= 0.75 and ours["edited"] >= theirs["edited"] - 0.26
    assert ours["identity"] > theirs["identity"] + 0.2
    assert ours["PSNR"] > theirs["PSNR"] + 1.0


def test_rf_inversion_returns_to_the_picture_as_eta_grows():
    lab = case("dit", 4)
    found = [same(lab, [rfinversion(lab, 8, eta, 1.0, 0, lab.before)]) for eta in (0.0, 0.5, 1.0)]
    assert found[1]["PSNR"] > found[0]["PSNR"] + 5.0 and found[2]["PSNR"] > found[1]["PSNR"] + 5.0
    assert found[2]["error"] < 1e-5


@pytest.mark.parametrize("which", ["unet", "dit"])
def test_edit_friendly_maps_return_the_picture_and_edit_it(which):
    lab = case(which, 4)
    assert same(lab, [editfriendly(lab, 8, 6, 0, positive=lab.before)])["error"] < 1e-5
    edited = lab.figures([editfriendly(lab, 12, 8, 0)])
    assert edited["edited"] >= 0.75 and edited["identity"] > 0.3
