"""Compiled code: the same results as the plain way, and the code itself where there is no compiler."""

import logging
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from two_ways import apart, chain, hopfield, pc, small

import lightning_ebm as ebm
from lightning_ebm.program.code import Code

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
pytestmark = pytest.mark.filterwarnings("ignore")


def layered() -> nn.Module:
    parts = [nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 32)]
    return nn.Sequential(*parts, nn.Sigmoid(), nn.Linear(32, 3))


def updates(
    algorithm: ebm.Algorithm, dtype: torch.dtype = torch.float64, make=layered, counts=(7, 7, 7), **options: bool
) -> tuple[list[dict[str, Tensor]], ebm.Learner]:
    """Of batches that repeat, after each of which the weights move."""
    torch.manual_seed(0)
    net = make().to(dtype)
    learner, found = ebm.Learner(net, algorithm, **options), []
    generator = torch.Generator().manual_seed(1)
    for count in counts:
        x, y = (
            torch.randn(count, net[0].in_features, generator=generator, dtype=torch.float64).to(dtype),
            torch.arange(count) % 3,
        )
        update = learner.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y))
        found.append({name: g.double() for name, g in update.items()})
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.01)
    return found, learner


ALGORITHMS = {
    "steps on states": lambda: pc(),
    "steps on errors": lambda: pc("errors"),
    "sweeps": lambda: hopfield(relaxer=ebm.FixedPoint(3), free_relaxer=ebm.FixedPoint(3)),
    "dual": lambda: ebm.algorithm("dual-propagation", relaxer=ebm.Dyadic(3, tol=0.0)),
}
QUICK = ("sweeps",)


@needs_compiler
@pytest.mark.parametrize(
    "algorithm", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS if name not in QUICK)]
)
def test_compiled_steps_end_where_the_plain_ones_do(algorithm: str) -> None:
    """With dropout masks."""
    make = small(layered) if algorithm in ("sweeps", "dual") else layered
    plain, _ = updates(ALGORITHMS[algorithm](), make=make, capture=False)
    fast, learner = updates(ALGORITHMS[algorithm](), make=make, compile=True)
    assert apart(fast, plain) < 1e-10
    codes = learner._programs.latest.traced.codes.values()
    assert codes
    assert all(isinstance(code, Code) for code in codes)


@pytest.mark.slow
@needs_compiler
def test_a_smaller_batch_is_code_of_its_own() -> None:
    counts = (7, 7, 7, 4, 4, 4, 7)
    plain, _ = updates(pc(), counts=counts, capture=False)
    fast, _ = updates(pc(), counts=counts, compile=True)
    assert apart(fast, plain) < 1e-10


@pytest.mark.slow
@needs_compiler
def test_single_precision_is_as_near_as_rounding_goes() -> None:
    plain, _ = updates(pc(), torch.float32, capture=False)
    fast, _ = updates(pc(), torch.float32, compile=True)
    assert apart(fast, plain) < 1e-4


@pytest.mark.slow
@needs_compiler
def test_tensors_that_lie_otherwise_in_memory() -> None:
    results = []
    for options in ({"capture": False}, {"compile": True}):
        torch.manual_seed(0)
        net = chain(nn.Tanh)().double()
        learner = ebm.Learner(net, pc(), **options)
        x, y, found = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3, []
        for turned in (False, False, True, True, True, True, False, False):
            given = x.t().contiguous().t() if turned else x
            found.append(learner.gradients(lambda given=given, net=net, y=y: F.cross_entropy(net(given), y)))
        results.append(found)
    assert apart(results[1], results[0]) < 1e-10


@needs_compiler
def test_batches_that_repeat_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = torch._inductor.compile
    monkeypatch.setattr(torch._inductor, "compile", lambda *given: made.append(1) or original(*given))
    net = chain(nn.Tanh)()
    learner = ebm.Learner(net, "predictive-coding", compile=True)
    counts = []
    for _ in range(4):
        learner.backward(lambda: F.cross_entropy(net(torch.ones(4, 6)), torch.arange(4) % 3))
        counts.append(len(made))
    assert counts[0] == 0  # a program is compiled when it comes again
    assert counts[1] > 0
    assert counts[1] == counts[2] == counts[3]


def test_without_a_compiler_the_code_runs_as_it_was_traced_and_that_is_said(monkeypatch, caplog) -> None:
    def none(*given: object) -> None:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch._inductor, "compile", none)
    plain, _ = updates(pc(), capture=False)
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        found, _ = updates(pc(), compile=True)
    assert apart(found, plain) < 1e-10
    assert any("no C++ compiler was found" in record.getMessage() for record in caplog.records)
