"""Where no layer reads another's state, the free equilibrium of a Hopfield network is its forward pass."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.energies.base import LayerView

PASSES: list[str] = []
"""Not on the module, whose attributes are put back after a pass that is not the user's."""


class OneHidden(nn.Module):
    """One layer of states, or with `deep` two; notes its passes."""

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.Linear(8, 8), nn.Sigmoid()] if deep else []
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), *middle, nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        PASSES.append("pass")
        return self.net(x)


class TwoBranches(OneHidden):
    """Two layers of states side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()

    def forward(self, x: Tensor) -> Tensor:
        PASSES.append("pass")
        return self.net[2](self.net[1](self.net[0](x)) + self.other(x))


X, Y = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3
FOUND = {
    "centred": ebm.algorithm("equilibrium-propagation"),
    "one-sided": ebm.algorithm("equilibrium-propagation", nudge=ebm.OneSided(0.05)),
    "holomorphic": ebm.algorithm("holomorphic-ep"),
    "cross-derivative": ebm.algorithm("recurrent-backprop"),
}


def from_zeros(algorithm: ebm.Algorithm) -> ebm.Algorithm:
    """The same, whose free phase is relaxed, from states of 0."""
    return ebm.Algorithm(
        algorithm.energy,
        algorithm.nudge,
        algorithm.relaxer,
        ebm.FixedPoint(40, tol=1e-14),
        update=algorithm.update,
        initial_state="zeros",
    )


@pytest.mark.parametrize("make", [OneHidden, TwoBranches])
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("name", FOUND)
def test_the_update_is_that_of_a_free_phase_that_is_relaxed(name: str, capture: bool, make: type[OneHidden]) -> None:
    updates, reports = [], []
    for algorithm in (FOUND[name], from_zeros(FOUND[name])):
        net = make()
        learner = ebm.Learner(net, algorithm, capture=capture)
        for _ in range(2):
            updates.append(learner.gradients(lambda net=net: F.cross_entropy(net(X), Y)))
        reports.append(learner.report["phases"][0])
    for other in updates[1:]:
        for key, value in updates[0].items():
            assert torch.allclose(other[key], value, rtol=1e-9, atol=1e-11), key
    resting, relaxed = reports
    assert resting["nudge"] == relaxed["nudge"] == 0
    assert (resting["status"], resting["steps"], resting["residual"]) == ("converged", 0, [0.0] * 5)
    assert resting["energies"] == pytest.approx(relaxed["energies"][-1:], abs=1e-12)


def test_the_energy_of_the_free_phase_is_the_formula() -> None:
    net = OneHidden()
    learner = ebm.Learner(net, "equilibrium-propagation")
    learner.gradients(lambda: F.cross_entropy(net(X), Y))
    drive = net.net[0](X)
    x = drive.sigmoid()
    energy = (x * x.log() + (1 - x) * (1 - x).log() - x * drive).sum()
    assert learner.report["energy_free"] == pytest.approx(float(energy), abs=1e-12)


@pytest.mark.parametrize(("deep", "passes"), [(False, 1), (True, 2)])
def test_the_users_code_runs_once_a_step_and_twice_where_layers_pull_on_each_other(deep: bool, passes: int) -> None:
    net = OneHidden(deep)
    learner = ebm.Learner(net, "equilibrium-propagation")
    counts = []
    for _ in range(4):
        PASSES.clear()
        learner.backward(lambda: F.cross_entropy(net(X), Y))
        counts.append(len(PASSES))
    assert counts[2:] == [passes, passes]
    assert (learner.report["phases"][0]["steps"] == 0) == (not deep)


@dataclass(frozen=True)
class Shifted(ebm.Hopfield):
    """Its layers rest elsewhere than where they are predicted: what a parent promises is not promised for it."""

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return super().layer_energy(state, layer) - 0.5 * state

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return super().best_response(pull + 0.5, layer)


def test_an_energy_that_promises_nothing_is_relaxed() -> None:
    net = OneHidden()
    found = []
    for start in ("forward", "zeros"):
        algorithm = ebm.Algorithm(
            Shifted(), ebm.Centered(0.1), ebm.FixedPoint(60, tol=1e-13), initial_state=start, update="contrast"
        )
        learner = ebm.Learner(net, algorithm)
        found.append(learner.gradients(lambda: F.cross_entropy(net(X), Y)))
        assert learner.report["phases"][0]["steps"] > 0
    for key, value in found[0].items():
        assert torch.allclose(found[1][key], value, rtol=1e-9, atol=1e-11)


def test_whoever_watches_sees_the_free_phase_as_the_one_point_it_is() -> None:
    from lightning_ebm.network.recording import Recording

    net = OneHidden()
    learner = ebm.Learner(net, "equilibrium-propagation")

    def closure() -> Tensor:
        return F.cross_entropy(net(X), Y)

    seen = []
    learner.observer = lambda network: seen.append(Recording(network)) or seen[-1]
    step = learner.begin(closure)
    with step.first_pass():
        loss = closure()
    step.surrogate(loss)
    free, *nudged = [trace.read() for trace in seen[-1].traces]
    assert free["nudge"] == 0
    assert len(free["internal"]) == 1
    assert max(free["residual"][0]) < 1e-12
    assert [trace["nudge"] for trace in nudged] == [phase["nudge"] for phase in learner.report["phases"][1:]]
