"""The page of what the library has been through says what the results say, and what has not been run."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reliability, lightning_suite, numerics = (script(name) for name in ("reliability", "lightning_suite", "numerics"))


def test_the_page_is_that_of_the_results():
    page = reliability.PAGE.read_text()
    assert reliability.with_figures(page, reliability.figures(ROOT / "docs" / "reliability")) == page


def test_the_page_of_numbers_is_that_of_the_results():
    page = numerics.PAGE.read_text()
    found = json.loads((ROOT / "docs" / "reliability" / "numerics.json").read_text())
    assert numerics.with_tables(page, found) == page


@pytest.mark.slow
def test_the_bound_of_a_negative_nudge_is_where_the_theory_has_it():
    found = numerics.negative()["squared error"]
    assert {float(share): said != "refused" for share, said in found.items()} == {s: s < 1 for s in numerics.SHARES}


def test_what_was_not_run_and_what_went_wrong_is_said(tmp_path):
    table = reliability.figures(tmp_path)
    assert table.count("not run for this page") == len(reliability.PARTS)
    (tmp_path / "faults.json").write_text(json.dumps({"passed": 7, "failed": 2, "skipped": 0, "on": "this"}))
    noticed = {"a": True, "b": False}
    (tmp_path / "mutants.json").write_text(json.dumps({"listed": 3, "noticed": noticed}))
    table = reliability.figures(tmp_path)
    assert "7 cases passed, **2 failed** | this |" in table
    assert "1 of 2 tried are noticed (of 3 listed); not yet: b" in table


def test_a_page_without_a_place_for_figures_is_refused():
    with pytest.raises(SystemExit, match="no place for the figures"):
        reliability.with_figures("# A page", "")


def test_files_of_the_suite_are_run_and_counted():
    found = reliability.tested(("sabotages",))
    count = (Path(__file__).parent / "test_sabotages.py").read_text().count("\ndef test_")
    assert found == {"passed": count, "failed": 0, "skipped": 0}


def test_lightnings_tests_are_compared_one_by_one():
    """What stock skips or fails is none of our business; a test that does not come up is wrong."""
    listed = next(iter(lightning_suite.EXPECTED))
    stock = {"a": ["passed", ""], "b": ["failed", "x"], "c": ["skipped", ""], "d": ["passed", ""], "e": ["passed", ""]}
    stock[f"tests/tests_pytorch/{listed}[1-two]"] = ["passed", ""]
    ours = {"a": ["passed", ""], "b": ["passed", ""], "d": ["failed", "E why"]}
    ours[f"tests/tests_pytorch/{listed}[1-two]"] = ["failed", "E"]
    found = lightning_suite.compared(stock, ours)
    assert (found["passed_in_stock"], found["passed"]) == (4, 1)
    assert found["wrong"] == {"d": "E why", "e": "did not run"}
    assert list(found["expected"].values()) == [lightning_suite.EXPECTED[listed]]
