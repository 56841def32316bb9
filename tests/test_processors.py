"""The same program on the same processor gives the same bits in every process, and says what it ran on."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

PACKAGE = Path(ebm.__file__).parent
TRAINED = """
import hashlib, json, torch, lightning_ebm as ebm
from torch import nn
torch.set_num_threads(1)
out = {}
for name, options in {"traced": {}, "plain": {"capture": False}}.items():
    for preset in ("predictive-coding", "equilibrium-propagation"):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(512, 256), nn.Hardsigmoid(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10),
        )
        x, y = torch.randn(64, 256), torch.arange(64) % 10
        learner = ebm.Learner(net, ebm.algorithm(preset, relaxer=ebm.FixedPoint(6) if preset[0] == "e" else None or
                                                 ebm.GradientDescent(0.1, 8)), **options)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            learner.backward(lambda: nn.functional.cross_entropy(net(x), y))
            optimizer.step()
        weights = torch.cat([p.detach().view(-1) for p in net.parameters()])
        out[f"{name} {preset}"] = {
            "bits": hashlib.sha256(weights.numpy().tobytes()).hexdigest(), "norm": float(weights.norm()),
            "probe": weights[:: len(weights) // 50].tolist(), "kernels": learner.report["kernels"],
        }
print(json.dumps(out))
"""
OTHERS = [
    {},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
]
"""Processors that this one can be taken for."""


def trained(hash_seed: int, variables: dict[str, str]) -> dict[str, dict[str, object]]:
    environment = {**os.environ, **variables, "PYTHONHASHSEED": str(hash_seed)}
    run = [sys.executable, "-c", TRAINED]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300, env=environment).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("variables", OTHERS, ids=["this", "the simplest", "AVX2"])
def test_the_same_seed_gives_the_same_weights_in_every_process(variables: dict[str, str]) -> None:
    first, again = (trained(seed, variables) for seed in (1, 2))
    assert first == again
    for preset in ("predictive-coding", "equilibrium-propagation"):
        traced, plain = first[f"traced {preset}"], first[f"plain {preset}"]
        assert traced["probe"] == pytest.approx(plain["probe"], abs=2e-4)
        assert str(traced["kernels"]).startswith("traced: ")
        assert str(plain["kernels"]).startswith("plain: ")
        if variables.get("ATEN_CPU_CAPABILITY") == "default":
            assert plain["kernels"] == "plain: DEFAULT"


MAY_TIME = {"callbacks", "recipes", "doctor.py"}
"""Rooms that tell people how long something took, and decide nothing of a step."""


def test_nothing_is_looked_up_in_the_library_of_torch_and_no_clock_decides() -> None:
    """No foreign function anywhere; what computes a step does not know what time it is."""
    computing = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in MAY_TIME]
    for room in ("program", "relaxers", "evaluations", "updates", "nudges", "energies", "strategies"):
        assert any(path.relative_to(PACKAGE).parts[0] == room for path in computing), room
    for path in PACKAGE.rglob("*.py"):
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert "ctypes" not in names, path
        assert path not in computing or not names & {"time", "timeit", "datetime"}, path
        assert "ops.mkldnn" not in path.read_text(), path


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("algorithm", "options", "first", "way"),
    [
        ("predictive-coding", {}, "plain", "traced"),
        ("predictive-coding", {"capture": False}, "plain", "plain"),
        ("zero-divergence", {}, "plain", "traced"),
        ("equilibrium-propagation", {}, "traced", "traced"),
        ("equilibrium-propagation", {"capture": False}, "plain", "plain"),
        ("holomorphic-ep", {}, "traced", "traced"),
        ("incremental-pc", {}, "plain", "traced"),
        ("infinitesimal", {}, "plain", "plain"),
        ("backprop", {}, "plain", "plain"),
    ],
)
def test_the_report_says_what_ran(algorithm: str, options: dict[str, bool], first: str, way: str) -> None:
    module = net()
    learner = ebm.Learner(module, algorithm, **options)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    for ran in (first, way, way):  # a program is traced when it comes again, or where its relaxation is long
        learner.step(lambda: F.cross_entropy(module(torch.ones(4, 6)), torch.arange(4) % 3), optimizer)
        assert learner.report["kernels"] == f"{ran}: {torch.backends.cpu.get_cpu_capability()}"
    json.dumps(learner.report)


def test_another_program_runs_the_plain_way_until_it_comes_again() -> None:
    module = net()
    learner, found = ebm.Learner(module, "predictive-coding"), []

    def closure(late: bool) -> Tensor:
        loss = F.cross_entropy(module(torch.ones(4, 6)), torch.arange(4) % 3)
        return loss + 0.1 * module(torch.zeros(4, 6)).square().mean() if late else loss

    for late in (False, False, True, False, True, True):
        learner.backward(lambda late=late: closure(late))
        found.append(learner.report["kernels"].split(":")[0])
    assert found == ["plain", "traced", "plain", "traced", "plain", "traced"]
