"""Promises about the package itself: documentation runs, imports go one way, optional things stay optional."""

import ast
import doctest
import importlib
import importlib.util
import itertools
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
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


def test_badges_say_what_is_true():
    pytest.importorskip("tomllib")
    spec = importlib.util.spec_from_file_location("badges", ROOT / "scripts" / "badges.py")
    badges = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(badges)
    readme, facts = (ROOT / "README.md").read_text(), badges.facts()
    assert set(re.findall(r"images/(badge_\w+)\.svg", readme)) == set(facts)
    for name, (label, value) in facts.items():
        assert (badges.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == badges.badge(label, value), name
        assert name in ("badge_license", "badge_sabotages") or f"{label} {value[2:]} and newer" in readme


def test_doctests():
    for found in pkgutil.walk_packages([str(PACKAGE)], "lightning_ebm."):
        module = importlib.import_module(found.name)
        space = {**vars(module), "OneSided": ebm.OneSided, "torch": importlib.import_module("torch")}
        result = doctest.testmod(module, extraglobs=space)
        assert result.failed == 0, found.name


# Folders whose files have ranks of their own; every other folder has one.
OPEN = ("program", "network", "step", "instruments")

# Lower layers know nothing of higher ones; torch alone below the strategy.
ORDER = [
    {"counted", "errors", "harmless", "notebook", "part", "promises"},
    {"checked", "questions"},
    {"energies", "nudges"},
    {"evaluations"},
    {"relaxers"},
    {"updates"},
    {"samples", "tensor_version", "module_walk", "tensors", "batch_size"},
    {"algorithm", "plain_state", "purity"},
    # lightning_ebm.program
    {
        "at_value",
        "decompositions",
        "dispatch",
        "draws_apart",
        "elsewhere",
        "fast_paths",
        "named",
        "not_recorded",
        "own_hooks",
        "pause",
        "sharded",
        "torch_faults",
    },
    {"collectives"},
    {"operations"},
    {"record", "user_hooks", "watch"},
    {"aliasing", "before", "complex_ops", "numbers", "products", "random_draws", "trail", "unseen_writes"},
    {"effects", "held"},
    {"custom_calls", "left", "schedule", "stage"},
    {"seams", "torch_calls"},
    {"contents"},
    {"following", "meanwhile", "picked"},
    {"recorder"},
    {"calls", "interpreter", "seen_grad", "tracer"},
    {"acting", "autograd_graph", "candidates", "locality"},
    {"comparison", "wiring"},
    {"exact_rule", "missing_layers", "nonlocal_weights"},
    {"rounding"},
    {"check", "code", "layers", "own_slopes", "reduction"},
    {"batch_sums"},
    {"programs"},
    # lightning_ebm.network
    {"analytic", "precomputed_gradient", "geometry", "second_derivatives", "top_down"},
    {"passes"},
    {"network"},
    {"clamped_states", "recording", "settings", "twin"},
    {"traced"},
    {"clamp"},
    {"presets"},
    # lightning_ebm.step, and what looks at an equilibrium
    {"closure", "report", "retained", "spectrum", "state_memory", "verdict"},
    {"divergence", "unsettled"},
    {"arithmetic", "outcome", "setup"},
    {"handed_over", "recorded"},
    {"phases"},
    {"blame", "coverage", "increments", "second_run"},
    {"quiet_pass", "user_pass"},
    {"at_rest", "step"},
    # and on
    {"depth", "relaxed"},
    {"learner", "equilibrium", "reference", "metrics", "summary", "testing"},
    {"curvature", "regime"},
    {"reports"},
    {"strategies"},
    {"callbacks", "doctor"},
    {"recipes"},
    {"__main__"},
]


def imports_of(path):
    """The modules that a file imports when it is loaded: what it imports for types alone is left out."""
    queue = [ast.parse(path.read_text())]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        queue.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            whole = node.module.removeprefix("lightning_ebm.") in ("lightning_ebm", *OPEN)
            yield from [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    level = {name: rank for rank, names in enumerate(ORDER) for name in names}

    def room(*parts: str) -> str:
        return parts[1] if parts[0] in OPEN else parts[0]

    rooms = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "__init__" or (parts[0] in OPEN and parts[1] == "__init__"):
            continue
        rooms.add(room(*parts))
        own = level[room(*parts)]
        for name in imports_of(path):
            if name.startswith("lightning_ebm."):
                assert level[room(*name.split(".")[1:])] <= own, f"{path} imports {name}"
            if name.split(".")[0] in ("lightning", "wandb"):
                assert own >= level["strategies"], f"{path} imports {name}"
    assert rooms == level.keys()


def test_long_files_say_why():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        is_long = len(text.splitlines()) > 300
        why = "Longer than 300 lines, as " in (ast.get_docstring(ast.parse(text)) or "")
        assert is_long == why, path


def test_no_function_is_longer_than_one_can_see():
    """45 lines, from the first to the last, docstring apart."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                said = len((ast.get_docstring(node, clean=False) or "").splitlines())
                assert (node.end_lineno or 0) - node.lineno + 1 - said <= 45, f"{path}: {node.name}"


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


class Variant:
    """What pytest hands over for one variant of a test, as far as crossings look at it."""

    originalname = "test_many"
    parent = SimpleNamespace(nodeid="tests/test_many.py")

    def __init__(self, params, crossed):
        self.callspec, self.crossed, self.slow = SimpleNamespace(params=params), crossed, False

    def get_closest_marker(self, name):
        return SimpleNamespace(args=(self.crossed,))

    def add_marker(self, marker):
        self.slow = True


@pytest.mark.parametrize(("sizes", "crossed"), [((3, 3, 3), 3), ((61, 5), 3), ((84, 2), 2), ((2, 10, 3), 4)])
def test_crossings_leave_one_variant_in_n_and_each_value_to_the_quick_lane(sizes, crossed):
    """A count of all variants in place of each parameter's own left all of 27 in, or one value of a parameter alone."""
    values = [[object() for _ in range(size)] for size in sizes]
    variants = [Variant(dict(enumerate(chosen)), crossed) for chosen in itertools.product(*values)]
    conftest.pytest_collection_modifyitems(variants)
    left = [variant.callspec.params for variant in variants if not variant.slow]
    assert abs(len(left) - len(variants) / crossed) <= len(variants) / max(sizes)
    for k, own in enumerate(values):
        assert {id(params[k]) for params in left} == set(map(id, own))
