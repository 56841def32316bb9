"""Captured best responses against the plain engine: Hopfield, Fenchel-Young and quadratic energies, all precisions.

The plain engine runs the user's code at every point and stays as the oracle; what is counted is what the machine is
asked to do, by a mode below autograd.
"""

from collections.abc import Callable

import pytest
import torch
from test_capture import NETS, Counting, Residual, apart, batches, both, cross_entropy, mlp, trained
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm


def small(make: Callable[[], nn.Module], gain: float = 0.5) -> Callable[[], nn.Module]:
    """Weights at which the map between the layers contracts: where it does not, rounding grows without bound."""

    def made() -> nn.Module:
        net = make()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= gain
        return net

    return made


def hopfield(**parts: object) -> ebm.Algorithm:
    given = {"nudge": ebm.Centered(0.25), "relaxer": ebm.FixedPoint(4), "free_relaxer": ebm.FixedPoint(6), **parts}
    return ebm.Algorithm(energy=ebm.Hopfield(), **given)  # type: ignore[arg-type]


def chain(act: Callable[[], nn.Module], last: Callable[[], nn.Module] = nn.Identity) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 3), last())


def squared(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return 0.5 * (net(batch[0]) - F.one_hot(batch[1], 3)).square().sum() / len(batch[0])


def captured(make: Callable[[], nn.Module], algorithm: ebm.Algorithm, step=cross_entropy) -> None:
    difference, captures = both(make, algorithm, step)
    assert captures.refused is None
    assert captures._used >= 6
    assert difference < 1e-12


# ------------------------------------------------------------------------------------------- the same numbers


NETS_THAT_SETTLE = {
    **{name: make for name, make in NETS.items() if name not in ("gelu", "prelu")},
    "residual": lambda: nn.Sequential(nn.Linear(6, 6), Residual(nn.Identity), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("net", NETS_THAT_SETTLE)
def test_centred_equilibrium_propagation_equals_the_plain_engine(net: str) -> None:
    """With weak feedback: batch normalisation makes up for small weights, so that these alone make no contraction."""
    captured(small(NETS_THAT_SETTLE[net], 0.3), ebm.algorithm(hopfield(), energy=ebm.Hopfield(0.1)))


@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid, nn.ReLU, nn.LeakyReLU, nn.Sigmoid])
@pytest.mark.parametrize("last", [nn.Identity, nn.Hardsigmoid, lambda: nn.Softmax(-1)], ids=["", "hard", "softmax"])
def test_every_conjugate_pair_and_output_states(act: type[nn.Module], last: Callable[[], nn.Module]) -> None:
    captured(small(chain(act, last)), hopfield(), squared)


RELAXERS = {
    "odd-even": ebm.FixedPoint(5),
    "synchronous": ebm.FixedPoint(5, order="synchronous", damping=0.3),
    "by tolerance": ebm.FixedPoint(50, tol=1e-6),
    "anderson": ebm.Anderson(6, tol=0.0),
    "euler": ebm.GradientDescent(0.1, 5),
    "euler by tolerance": ebm.GradientDescent(0.3, 30, tol=1e-4),
}


@pytest.mark.parametrize("relaxer", RELAXERS)
@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid])
def test_every_relaxer_on_a_bounded_energy(relaxer: str, act: type[nn.Module]) -> None:
    captured(small(chain(act)), hopfield(relaxer=RELAXERS[relaxer], free_relaxer=None))


@pytest.mark.parametrize("relaxer", ["odd-even", "synchronous", "anderson", "euler"])
@pytest.mark.parametrize("energy", [ebm.FenchelYoung(), ebm.PredictiveCoding(), ebm.Hopfield(0.3)], ids=str)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.3), ebm.Centered(0.1)], ids=str)
def test_every_energy_and_nudge(energy: ebm.Energy, nudge: ebm.Nudge, relaxer: str) -> None:
    captured(small(mlp), ebm.Algorithm(energy, nudge, RELAXERS[relaxer]))


@pytest.mark.parametrize("nudge", [ebm.Coupled(0.1), ebm.Clamped(), ebm.RandomSign(0.1)], ids=str)
def test_held_outputs_and_random_signs(nudge: ebm.Nudge) -> None:
    make = small(chain(nn.Tanh))
    plain, *_ = trained(make, hopfield(nudge=nudge), False)
    fresh = ebm.RandomSign(0.1) if isinstance(nudge, ebm.RandomSign) else nudge
    fast, captures, _ = trained(make, hopfield(nudge=fresh), True)
    assert captures is not None
    assert captures.refused is None
    assert apart(fast, plain) < 1e-12


@pytest.mark.parametrize("start", ["zeros", "last-visit"])
def test_wherever_the_free_phase_starts(start: str) -> None:
    captured(small(mlp), hopfield(initial_state=start))


def test_the_free_phase_before_a_cross_derivative() -> None:
    captured(small(mlp), ebm.algorithm("recurrent-backprop", relaxer=ebm.FixedPoint(30)))


PRECISIONS = {
    "by layer": {"1": 2.0, "3": torch.tensor(0.5)},
    "by unit": torch.linspace(0.5, 2, 8, dtype=torch.float64),
    "of another type": torch.linspace(0.5, 2, 8),
    "learned": ebm.LearnedPrecision(0.3),
    "learned by unit": ebm.LearnedPrecision(0.3, per="unit"),
}


@pytest.mark.parametrize("relaxer", ["odd-even", "euler", "errors"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_as_precisions(precision: str, relaxer: str) -> None:
    """Learned ones move between the steps; those of a capture move with them."""
    relaxers = {**RELAXERS, "errors": ebm.ErrorCoordinates(max_steps=3, lr=0.2, tol=0.0)}
    results = []
    for capture in (False, True):
        given = PRECISIONS[precision]
        if isinstance(given, ebm.LearnedPrecision):
            given = ebm.LearnedPrecision(0.3, per=given.per)
        algorithm = ebm.Algorithm(ebm.PredictiveCoding(given), ebm.OneSided(0.5), relaxers[relaxer])
        updates, captures, _ = trained(mlp, algorithm, capture)
        results.append(updates)
    assert captures is not None
    assert captures.refused is None
    assert captures._used == 6
    assert apart(results[1], results[0]) < 1e-12


def test_reports_are_those_of_the_plain_engine() -> None:
    reports = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(mlp)().double()
        learner = ebm.Learner(net, hopfield(relaxer=ebm.FixedPoint(50, tol=1e-6)), capture=capture)
        for x, y in batches():
            learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        reports.append(learner.report)
    plain, fast = reports
    assert [p["steps"] for p in fast["phases"]] == [p["steps"] for p in plain["phases"]]
    for one, other in zip(fast["phases"], plain["phases"], strict=True):
        assert one["energies"] == pytest.approx(other["energies"], rel=1e-12)
        assert one["residual"] == pytest.approx(other["residual"], rel=1e-6, abs=1e-9)
    assert fast["energy_free"] == pytest.approx(plain["energy_free"], rel=1e-12)


# ---------------------------------------------------------------------------------------------- the work done


def test_the_drive_of_the_input_once_and_one_product_for_the_contrast() -> None:
    """Half a sweep computes its own half only; no weight gradient but one, for both phases, of each weight."""
    net = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(5, 11), torch.arange(5) % 3
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        return 0.5 * (net(x) - F.one_hot(y, 3)).square().sum() / 5

    learner = ebm.Learner(net, hopfield(), output="state")
    learner.backward(closure)
    runs = 0
    with Counting() as counting:
        learner.backward(closure)
    assert runs == 2  # at the predictions, quietly, and as the user's own at the free equilibrium
    shapes = counting.shapes
    assert shapes.count((5, 11, 8)) == 2
    assert shapes.count((8, 5, 11)) == 1  # the input is the same in both phases
    assert shapes.count((9, 10, 8)) == shapes.count((3, 10, 9)) == 1  # all others: two batches of 5, stacked
    sweeps, energies = 6 + 4 + 4, 4
    for up, down in (((5, 8, 9), (5, 9, 8)), ((5, 9, 3), (5, 3, 9))):
        assert shapes.count(up) == sweeps + energies + 2
        assert shapes.count(down) == sweeps
    assert len(shapes) == 2 + 3 + 2 * (2 * sweeps + energies + 2)
