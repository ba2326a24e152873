"""Boots the real host once, loads the pack through it, and lends both to the tests.

Test modules may `import steer...` (the modules that the host loaded), any module of the host, and the helpers that
lie beside this file.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import host  # noqa: E402

host.load_pack()  # at import, so that test modules can import `steer` at their top


@pytest.fixture
def run_prompt():
    """Runs an API prompt in this process; `run_prompt(prompt)["3"]` is the tuple of node 3's outputs."""
    return host.execute
