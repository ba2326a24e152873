"""A server and a browser, each started once and only when a test asks for them."""

import sys

import browser
import host
import pytest
from PIL import Image

sys.path.append(str(host.ROOT / "workflows"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    running = browser.Server(tmp_path_factory.mktemp("server") / "files")
    Image.new("RGB", (64, 48), "orange").save(running.folder / "input" / "example.png")
    yield running
    running.close()


@pytest.fixture(scope="session")
def page(server):
    executable = browser.find_chromium()
    if executable is None:
        pytest.skip("needs Chromium or Chrome (Debian and Ubuntu: apt-get install chromium)")
    shown = browser.Browser(executable, server.url)
    shown.wait("!!(window.app && window.app.graph && window.app.vueAppReady)", seconds=180)
    settle(shown)
    yield shown
    shown.close()


def settle(page):
    """Waits until the page says nothing new: its default workflow asks for models that it may not look up."""
    heard = -1
    while heard < len(page.console):
        heard = len(page.console)
        page.evaluate("new Promise(done => setTimeout(done, 1500))")
