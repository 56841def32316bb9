"""Compiled code: the same results whatever the layout, and the code itself where there is no compiler."""

import logging
import shutil
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.capture import compiled, products
from lightning_ebm.capture.compiled import Compiled

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")


def code(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (torch.tanh(a[0]) * b[0] - a[1], a[1].sum(1)), (b[0].exp(),)


def arguments(turned: bool = False) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    return (x.t().contiguous().t() if turned else x, y), (z,)


def same(found, expected) -> None:
    assert [len(part) for part in found] == [len(part) for part in expected]
    for one, other in zip((t for part in found for t in part), (t for part in expected for t in part), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-14)


@needs_compiler
def test_tensors_that_lie_otherwise_in_memory_are_met_by_compiling_once_more(monkeypatch) -> None:
    made = []
    original = compiled._compiled
    monkeypatch.setattr(compiled, "_compiled", lambda *given: made.append(1) or original(*given))
    run = Compiled(code)
    same(run(*arguments()), code(*arguments()))
    same(run(*arguments()), code(*arguments()))
    assert len(made) == 1
    same(run(*arguments(turned=True)), code(*arguments(turned=True)))
    assert len(made) == 2
    same(run(*arguments()), code(*arguments()))
    assert len(made) == 2


@needs_compiler
def test_batches_that_repeat_compile_nothing(monkeypatch) -> None:
    """Errors start as zeros that lie nowhere in particular, and are tensors of their own from the first step on."""
    made = []
    original = compiled._compiled
    monkeypatch.setattr(compiled, "_compiled", lambda *given: made.append(1) or original(*given))
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    learner = ebm.Learner(net, "predictive-coding", compile=True)
    counts = []
    for _ in range(3):
        learner.backward(lambda: F.cross_entropy(net(torch.ones(4, 5)), torch.arange(4) % 3))
        counts.append(len(made))
    assert counts[0] > 0
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("slow", ["compiled", "plain"])
def test_the_faster_of_both_is_kept(slow, monkeypatch) -> None:
    ran = []

    def taking(name, function):
        def run(*args):
            ran.append(name)
            time.sleep(0.02 if name == slow else 0)
            return function(*args)

        return run

    monkeypatch.setattr(compiled, "_compiled", lambda function, example: taking("compiled", function))
    run = Compiled(code, taking("plain", code))
    same(run(*arguments()), code(*arguments()))
    ran.clear()
    same(run(*arguments()), code(*arguments()))
    assert ran == ["plain" if slow == "compiled" else "compiled"]


def test_without_a_compiler_the_code_runs_as_it_is_and_that_is_said_once(monkeypatch, caplog) -> None:
    def none(*given):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(compiled, "_compiled", none)
    compiled._say_once.cache_clear()
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % 3
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 6))
    found = {}
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        for options in ({"compile": True}, {"compile": True}, {"capture": False}):
            learner = ebm.Learner(net, algorithm, **options)
            found[str(options)] = learner.gradients(lambda: F.cross_entropy(net(x), y))
    uncompiled, plain = found.values()
    for name, value in plain.items():
        assert torch.allclose(uncompiled[name], value, rtol=0, atol=1e-13)
    assert [record.getMessage().count("no C++ compiler was found") for record in caplog.records] == [1]


def test_compiled_code_that_gives_other_numbers_is_not_used(monkeypatch, caplog) -> None:
    """A step off in the second decimal: seen by the comparison at capture, and the captured code itself runs."""

    def off(function, example):
        return lambda *tensors: [tensor * 1.01 for tensor in function(*tensors)]

    monkeypatch.setattr(compiled, "_compiled", off)
    compiled._say_once.cache_clear()
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % 3
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 6))
    learner = ebm.Learner(net, algorithm, compile=True)
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        found = learner.gradients(lambda: F.cross_entropy(net(x), y))
    plain = ebm.Learner(net, algorithm, capture=False).gradients(lambda: F.cross_entropy(net(x), y))
    for name, value in plain.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-13)
    assert learner._captures[0].refused is None
    assert [record.getMessage().count("gives other values") for record in caplog.records] == [1]


@needs_compiler
def test_compiled_steps_end_where_the_plain_ones_do() -> None:
    """Fronts, whole steps and forces, with dropout masks and a smaller last batch."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(8, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Dropout(0.3),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.Sigmoid(),
    ]
    net = nn.Sequential(*layers, nn.Linear(32, 3)).double()
    batches = [(torch.randn(n, 8, dtype=torch.float64), torch.arange(n) % 3) for n in (7, 7, 4)]
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 7))
    results = []
    for options in ({"compile": True}, {"capture": False}):
        torch.manual_seed(1)
        learner = ebm.Learner(net, algorithm, **options)
        results.append([learner.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y)) for x, y in batches])
        results[-1].append(learner.report["phases"][0]["energies"])
    (*fast, energies), (*plain, others) = results
    assert energies == pytest.approx(others, abs=1e-12)
    for one, other in zip(fast, plain, strict=True):
        for name, value in other.items():
            assert torch.allclose(one[name], value, rtol=0, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Hardsigmoid])
def test_products_of_the_faster_library_are_compiled_with_what_is_done_to_them(
    activation, small, monkeypatch, caplog
) -> None:
    """A pull is added to a drive, and both signs of the nudge come as one batch: no code is given up, none differs."""
    monkeypatch.setattr(products, "available", lambda: True)
    monkeypatch.setattr(products, "kernel", products.torchs_kernel if small else lambda: None)
    compiled._say_once.cache_clear()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 128), activation(), nn.Linear(128, 128), activation(), nn.Linear(128, 10))
    x, y = torch.randn(64, 20), torch.arange(64) % 10
    algorithm = ebm.Algorithm(ebm.Hopfield(), ebm.Centered(0.5), ebm.FixedPoint(5))
    found = []
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        for compile in (False, True):
            learner = ebm.Learner(net, algorithm, compile=compile)
            learner.gradients(lambda: F.cross_entropy(net(x), y))
            found.append(learner.gradients(lambda: F.cross_entropy(net(x), y)))
    assert not caplog.records
    codes = [program.point for captured in learner._captures[0]._kept for program in captured.programs.values()]
    assert all(isinstance(code, Compiled) and not code._gave_up for code in codes)
    for name, gradient in found[0].items():
        assert float((gradient - found[1][name]).abs().max()) < 1e-4 * float(gradient.abs().max()), name
