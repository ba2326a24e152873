import itertools

import pytest
from steer.models.lab import common, edit, geometry
from steer.models.lab.load import load_model
from steer.models.lab.reader import load_reader


@pytest.fixture(scope="module")
def models():
    return load_model("unet")


@pytest.fixture(scope="module")
def reader():
    return load_reader()


@pytest.fixture
def clock(monkeypatch):
    """From one look at the processor time to the next a training spends a quarter of a second, on every machine."""
    monkeypatch.setattr(common, "process_time", itertools.count(step=0.25).__next__)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder with five pairs of portraits, and a judge that was trained for a moment on ten others."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "WEIGHTS", folder)
        edit.build(folder, 5)
        geometry.build(folder, 10)
        geometry.train(folder, 1, batch=4)
    return folder
