"""Captured pairs of states and captured frozen predictions against the plain engine."""

from collections.abc import Callable

import pytest
import torch
from test_capture import (
    CAPTURED,
    EITHER,
    NETS,
    PLAIN,
    Box,
    Counting,
    Residual,
    batches,
    both,
    cross_entropy,
    mlp,
)
from test_capture_fixed_points import chain, small, squared
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

NETS = {
    **{name: make for name, make in NETS.items() if name not in ("gelu", "prelu")},
    "residual without statistics": lambda: nn.Sequential(nn.Linear(6, 6), Residual(nn.Identity), nn.Linear(6, 3)),
}


def dual(relaxer: ebm.Relaxer | None = None, **parts: object) -> ebm.Algorithm:
    return ebm.algorithm("dual-propagation", relaxer=relaxer or ebm.Dyadic(5, tol=0.0), **parts)


def frozen(relaxer: ebm.Relaxer | None = None, **parts: object) -> ebm.Algorithm:
    return ebm.algorithm("fixed-prediction", relaxer=relaxer or ebm.FixedPrediction(), **parts)


def captured(make: Callable[[], nn.Module], algorithm: ebm.Algorithm, step=cross_entropy) -> None:
    difference, captures = both(make, algorithm, step)
    assert captures.refused is None
    assert captures._used >= 6
    assert difference < 1e-12


FAMILY = {"dual": dual, "frozen": frozen}


@pytest.mark.parametrize("algorithm", FAMILY)
@pytest.mark.parametrize("net", NETS)
def test_equals_the_plain_engine(net: str, algorithm: str) -> None:
    """Pairs drift apart where the loop's gain is high, as behind a normalisation: there the pull is weak."""
    nudge = {"nudge": ebm.OneSided(0.01)} if algorithm == "dual" and "norm" in net else {}
    captured(small(NETS[net]), FAMILY[algorithm](**nudge))


@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid, nn.ReLU, nn.LeakyReLU, nn.Sigmoid])
@pytest.mark.parametrize("last", [nn.Identity, nn.Hardsigmoid, lambda: nn.Softmax(-1)], ids=["", "hard", "softmax"])
@pytest.mark.parametrize("algorithm", FAMILY)
def test_every_activation_and_output_states(
    algorithm: str, act: type[nn.Module], last: Callable[[], nn.Module]
) -> None:
    captured(small(chain(act, last)), FAMILY[algorithm](), squared)


@pytest.mark.parametrize("energy", [ebm.FenchelYoung(), ebm.PredictiveCoding(2.0), ebm.PredictiveCoding()], ids=str)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.3), ebm.OneSided(-0.3), ebm.Centered(0.1)], ids=str)
@pytest.mark.parametrize("relaxer", [ebm.Dyadic(6), ebm.Dyadic(50, tol=1e-5), ebm.Dyadic(1, tol=0.0)], ids=str)
def test_pairs_of_every_energy_and_nudge(energy: ebm.Energy, nudge: ebm.Nudge, relaxer: ebm.Relaxer) -> None:
    captured(small(mlp), dual(relaxer, energy=energy, nudge=nudge))


PRECISIONS = {
    "by layer": {"1": 2.0, "3": torch.tensor(0.5)},
    "by unit": torch.linspace(0.5, 2, 8, dtype=torch.float64),
    "of another type": torch.linspace(0.5, 2, 8),
}


@pytest.mark.parametrize("relaxer", [ebm.FixedPrediction(), ebm.FixedPrediction(6, lr=0.4, tol=0.0)], ids=str)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.3), ebm.Centered(0.1)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_predictions_with_every_precision(precision: str, nudge: ebm.Nudge, relaxer: ebm.Relaxer) -> None:
    captured(mlp, frozen(relaxer, nudge=nudge, energy=ebm.PredictiveCoding(PRECISIONS[precision])))


@pytest.mark.parametrize("algorithm", FAMILY)
@pytest.mark.parametrize("step", [*CAPTURED, *PLAIN, *EITHER], ids=lambda step: step.__name__)
def test_no_change_from_batch_to_batch_is_missed(step, algorithm: str) -> None:
    """Frozen predictions are those of the first pass, values of states and all: nothing is run at other states."""
    difference, captures = both(small(Box), FAMILY[algorithm](), step)
    assert difference < 1e-12
    if step in PLAIN and algorithm == "frozen" and step.__name__.startswith(("random", "values")):
        assert captures.refused is None
    elif step in PLAIN:
        assert PLAIN[step] in (captures.refused or "")
    else:
        assert captures.refused is None


@pytest.mark.parametrize("algorithm", FAMILY)
def test_reports_are_those_of_the_plain_engine(algorithm: str) -> None:
    reports = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(mlp)().double()
        learner = ebm.Learner(net, FAMILY[algorithm](), capture=capture)
        for x, y in batches():
            learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        reports.append(learner.report)
    plain, fast = reports
    assert [p["steps"] for p in fast["phases"]] == [p["steps"] for p in plain["phases"]]
    for one, other in zip(fast["phases"], plain["phases"], strict=True):
        assert one["energies"] == pytest.approx(other["energies"], rel=1e-12)
        assert one["residual"] == pytest.approx(other["residual"], rel=1e-6, abs=1e-9)


def counted(algorithm: ebm.Algorithm) -> list[tuple[int, ...]]:
    """The products of one captured step."""
    net = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(5, 11), torch.arange(5) % 3
    learner = ebm.Learner(net, algorithm)
    runs = 0

    def closure() -> torch.Tensor:
        nonlocal runs
        runs += 1
        return F.cross_entropy(net(x), y)

    learner.backward(closure)
    runs = 0
    with Counting() as counting:
        learner.backward(closure)
    assert runs == 1
    return counting.shapes


def test_a_round_of_pairs_is_one_way_up_and_one_down() -> None:
    shapes = counted(dual(ebm.Dyadic(5, tol=0.0)))
    assert shapes.count((5, 11, 8)) == 1
    rounds = 5 + 1
    assert shapes.count((5, 9, 8)) == shapes.count((5, 3, 9)) == rounds
    energies = 2  # at the start and at the end
    assert shapes.count((5, 8, 9)) == shapes.count((5, 9, 3)) == 1 + rounds + energies + 1
    assert shapes.count((8, 5, 11)) == shapes.count((9, 5, 8)) == shapes.count((3, 5, 9)) == 1


def test_frozen_predictions_are_those_of_the_first_pass() -> None:
    """Nothing is computed forward again, and the loss is differentiated once."""
    shapes = counted(frozen(ebm.FixedPrediction(4, tol=0.0)))
    hops = 4 + 1
    assert shapes.count((5, 11, 8)) == shapes.count((5, 8, 9)) == shapes.count((5, 9, 3)) == 1
    assert shapes.count((5, 9, 8)) == hops
    assert shapes.count((5, 3, 9)) == 1
    assert shapes.count((8, 5, 11)) == shapes.count((9, 5, 8)) == shapes.count((3, 5, 9)) == 1
