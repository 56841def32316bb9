"""The list of sabotages quotes the code as it is: a stale quote would test nothing."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("mutation_test", ROOT / "scripts" / "mutation_test.py")
assert _SPEC is not None
assert _SPEC.loader is not None
mutation_test = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mutation_test)


def test_every_quoted_line_is_found_exactly_once() -> None:
    texts = {m.file: (ROOT / mutation_test.PACKAGE / m.file).read_text() for m in mutation_test.MUTATIONS}
    counts = {m.what: texts[m.file].count(m.text) for m in mutation_test.MUTATIONS}
    assert {what: count for what, count in counts.items() if count != 1} == {}


def test_every_sabotage_is_one_and_names_tests_that_exist() -> None:
    assert len({m.what for m in mutation_test.MUTATIONS}) == len(mutation_test.MUTATIONS)
    for m in mutation_test.MUTATIONS:
        assert m.text != m.sabotage
        files = [ROOT / "tests" / f"test_{name}.py" for name in m.tests.split()]
        assert all(file.exists() for file in files), (m.what, files)


def test_every_sabotage_is_code() -> None:
    """What does not compile is noticed by anything at all, and ends the run that the others are in."""
    for m in mutation_test.MUTATIONS:
        text = (ROOT / mutation_test.PACKAGE / m.file).read_text()
        compile(text.replace(m.text, m.sabotage), m.file, "exec")
