import architectures_table
import host


def test_the_readme_says_what_a_run_finds():
    assert architectures_table.table() == architectures_table.written()


def test_every_guidance_method_is_in_it():
    methods = {path.stem for path in (host.ROOT / "patches" / "guidance").glob("*.py")}
    assert methods - set(architectures_table.METHODS) == {"__init__", "instructpix2pix", "report"}
