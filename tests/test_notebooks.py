"""The notebooks run from the first cell to the last, and what a cell ends with shows itself."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def shown_by(source, space):
    """Runs a cell as a notebook does; what its last line is worth, None where that is no expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), space)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text())["cells"]
    space = {"__name__": "notebook"}
    shown = [shown_by("".join(cell["source"]), space) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells)  # what was shown once is made again
    ours = [value for value in shown if type(value).__module__.startswith("lightning_ebm")]
    assert ours
    assert all("<table>" in value._repr_html_() for value in ours)
    if path.stem == "swap":
        said = capsys.readouterr().out
        assert said.count("Error: ") == 3
        assert "Did you mean 'pc-nudge'?" in said
