"""The run that is prepared for a GPU, at reduced size on a CPU."""

import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(
    "network", ["MLP", *(pytest.param(n, marks=pytest.mark.slow) for n in ("VGG7", "ResNet18")), "ViT-S", "GPT"]
)
def test_every_network_is_measured_in_every_precision(network, precision, script, monkeypatch):
    """The exact rule is backprop, which tells that the update that is timed is the right one."""
    monkeypatch.setattr(script, "LONGEST", 1e-9)
    rows = [
        r for r in script.settings([network], ["eager"], [precision]) if r.algorithm in ("zero-divergence", "error-pc")
    ]
    found = script.table(rows, script.NETWORKS["tiny"], CPU, time.monotonic() + 120)
    assert [row.why for row in found] == ["", ""]
    assert all(row.ms > 0 and math.isnan(row.memory) for row in found)
    assert found[0].cosine > (0.999 if precision == "bf16" else 0.99999)
    assert 0.1 < found[1].cosine < 1


def test_rows_for_which_no_time_is_left_are_named(script):
    rows = script.settings(["MLP"], ["eager"], ["fp32"])
    found = script.table(rows, script.NETWORKS["tiny"], CPU, time.monotonic())
    assert {row.why for row in found} == {"no time left"}
    text = script.page(found, "1 passed", "nothing", 1.0)
    assert all(f"MLP, {name}, fp32, eager" in text for name in script.ALGORITHMS)


def test_what_is_most_asked_for_comes_first(script):
    rows = script.settings(list(script.NETWORKS["full"]), list(script.WAYS), list(script.PRECISIONS))
    assert len(rows) == 5 * 7 * 2 * 3
    assert {(row.precision, row.way) for row in rows[:35]} == {("fp32", "eager")}
    assert {row.way for row in rows[105:]} == {"compiled"}


@pytest.mark.slow
def test_the_whole_run_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.md"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--size", "tiny", "--networks", "MLP", "--ways", "eager"]
    command += ["--precisions", "fp32", "--seconds", "200", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    lines = out.read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if " | fp32 | " in line}
    assert next(iter(rows)) == "backprop"
    assert len(rows) == 7
    assert all(float(cells[3]) > 0 for cells in rows.values())
    assert float(rows["zero-divergence"][-1].strip(" |")) == pytest.approx(1, abs=1e-5)
    assert "skipped" in out.read_text()  # the tests that need a GPU


def test_the_page_says_that_nothing_was_measured_until_something_is(script):
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert page == script.page([]) or "| backprop | fp32 | eager |" in page
    assert "gpu.md" in (ROOT / "mkdocs.yml").read_text()
