import architectures_table
import editing_table
import host
import pytest

TABLES = architectures_table, editing_table
SAID = {table: architectures_table.read(table.BEGIN) for table in TABLES}
LINES = [(table, architecture) for table in TABLES for architecture in SAID[table]]


@pytest.mark.parametrize("table", TABLES)
def test_it_has_a_line_for_every_architecture(table):
    assert list(SAID[table]) == list(table.networks())


@pytest.mark.parametrize("table, architecture", LINES)
def test_the_readme_says_what_a_run_finds(table, architecture):
    found, said = table.answers(table.networks()[architecture]), SAID[table][architecture]
    names = architectures_table.names()
    said = {method: said.pop(names[method]) for method in found}
    assert found == said


def test_every_method_of_these_rooms_is_in_one():
    def methods(room):
        return {path.stem for path in (host.ROOT / "patches" / room).glob("*.py")} - {"__init__"}

    assert methods("guidance") - set(architectures_table.METHODS) == {"instructpix2pix", "report"}
    assert methods("attention") | methods("hspace") <= {*editing_table.METHODS, "asymmetricsampler", "diffuseit"}
