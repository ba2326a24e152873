import architectures_table
import host
import pytest

SAID = architectures_table.read()


def test_it_has_a_line_for_every_architecture():
    assert list(SAID) == list(architectures_table.networks())


@pytest.mark.parametrize("architecture", SAID)
def test_the_readme_says_what_a_run_finds(architecture):
    found = architectures_table.answers(architectures_table.networks()[architecture])
    names = architectures_table.names()
    assert {names[method]: cell for method, cell in found.items()} == SAID[architecture]


def test_every_guidance_method_is_in_it():
    methods = {path.stem for path in (host.ROOT / "patches" / "guidance").glob("*.py")}
    assert methods - set(architectures_table.METHODS) == {"__init__", "instructpix2pix", "report"}
