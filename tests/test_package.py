"""Promises about the package itself: documentation runs, imports go one way, optional things stay optional."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_ebm as ebm

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ebm.__file__).parent


@pytest.mark.filterwarnings("ignore")
def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)


def test_doctests():
    for found in pkgutil.walk_packages([str(PACKAGE)], "lightning_ebm."):
        module = importlib.import_module(found.name)
        space = {**vars(module), "OneSided": ebm.OneSided, "torch": importlib.import_module("torch")}
        result = doctest.testmod(module, extraglobs=space)
        assert result.failed == 0, found.name


# Lower layers know nothing of higher ones; torch alone below the strategy.
ORDER = [
    {"errors", "harmless", "promises"},
    {"energies", "nudges"},
    {"relaxers"},
    {"automatic"},
    {"samples", "stamps", "tree"},
    {"algorithm", "closure", "plain_state", "promotion", "purity", "substitution", "wiring"},
    {"delivery", "layers", "network", "reduction"},
    {"holding", "linearization", "state_memory", "watching"},
    # the rooms of lightning_ebm.capture
    {"dyads", "front", "heap", "mode", "parts", "places", "traits"},
    {"values"},
    {"tape"},
    {"comparison", "writing"},
    {"abreast", "contrast", "elementwise", "lowering", "pairs", "products", "remember", "simplify"},
    {"operators", "rows"},
    {"kernels"},
    {"continuation", "order", "pair_rules", "reuse"},
    {"faster"},
    {"compiled", "formulas", "program"},
    {"checking"},
    {"captures", "recording"},
    {"running"},
    {"replay"},
    {"presets", "report", "step", "learner", "equilibrium", "reference", "metrics", "summary", "testing"},
    {"regime"},
    {"advice", "runs"},
    {"plots", "html_report"},
    {"manual", "companion", "strategy", "distributed"},
    {"callbacks"},
    {"__main__"},
]


def test_imports_go_one_way():
    level = {name: rank for rank, names in enumerate(ORDER) for name in names}

    def room(*parts: str) -> str:
        return parts[1] if parts[0] == "capture" else parts[0]

    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "__init__" or parts == ("capture", "__init__"):
            continue
        own = level[room(*parts)]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "lightning_ebm.capture":
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                assert node.level == 0, f"{path}: relative import"
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("lightning_ebm."):
                    assert level[room(*name.split(".")[1:])] <= own, f"{path} imports {name}"
                if name.split(".")[0] in ("lightning", "wandb"):
                    assert own >= level["strategy"], f"{path} imports {name}"


def test_public_names_are_documented():
    assert len(set(ebm.__all__)) == len(ebm.__all__)
    for name in ebm.__all__:
        assert getattr(ebm, name).__doc__, name


@pytest.mark.parametrize("preset", ebm.algorithms())
def test_every_preset_states_formulas_and_source(preset):
    from lightning_ebm.presets import PRESETS

    text = PRESETS[preset].__doc__ or ""
    if preset != "backprop":
        assert "Energy:" in text
        assert "Update:" in text
        assert "Source:" in text


def test_import_works_where_wandb_is_broken_and_does_not_load_it(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise RuntimeError('broken')")
    code = "import sys, lightning_ebm; assert 'wandb' not in sys.modules; print(lightning_ebm.algorithms())"
    path = f"{tmp_path}:{PACKAGE.parent}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pc-nudge" in done.stdout
