import pytest
import toy
from steer.patches.shared.schedule import Schedule


def sampling(kind):
    return toy.model(kind=kind).get_model_object("model_sampling")


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_percent_means_the_same_on_every_model(kind):
    ms = sampling(kind)
    window = Schedule(0.2, 0.6).resolve(ms)
    inside = [p / 100 for p in range(101) if window.weight(float(ms.percent_to_sigma(p / 100))) == 1.0]
    assert inside == [p / 100 for p in range(20, 60)]


def test_windows_that_meet_share_no_step():
    ms = sampling("eps")
    early, late = Schedule(0.0, 0.4).resolve(ms), Schedule(0.4, 1.0).resolve(ms)
    for sigma in [*ms.sigmas.tolist(), float(ms.percent_to_sigma(0.4))]:
        assert early.weight(sigma) + late.weight(sigma) == 1.0


def test_last_step_belongs_to_a_window_that_ends_at_one():
    ms = sampling("eps")
    assert Schedule(0.5, 1.0).resolve(ms).weight(float(ms.sigma_min)) == 1.0
    assert Schedule(0.5, 1.0).resolve(ms).weight(1e-6) == 1.0


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_curve_is_read_over_percent(kind):
    ms = sampling(kind)
    window = Schedule(curve=tuple(i / 256 for i in range(257))).resolve(ms)
    for p in (0.1, 0.25, 0.5, 0.9):
        assert window.weight(float(ms.percent_to_sigma(p))) == pytest.approx(p, abs=2e-3)


def test_closed():
    assert Schedule(0.5, 0.5).closed and Schedule(0.6, 0.2).closed and Schedule(curve=(0.0, 0.0)).closed
    assert not Schedule().closed and Schedule().always and not Schedule(0.0, 0.9).always


def test_percent_out_of_range():
    with pytest.raises(ValueError, match="between 0 and 1, got 0.0 and 1.5"):
        Schedule(0.0, 1.5)


def test_overlap():
    assert Schedule(0.0, 0.5).overlaps(Schedule(0.4, 1.0))
    assert not Schedule(0.0, 0.5).overlaps(Schedule(0.5, 1.0))
