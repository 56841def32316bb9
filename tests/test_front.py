"""States that no signal has reached: known ahead, never computed, and exactly where the forward pass left them."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.capture.front import Front


def plan(parents: Sequence[Sequence[int]], loss_parents: Sequence[int]) -> Any:
    return SimpleNamespace(rows=[SimpleNamespace(parents=tuple(p)) for p in parents], loss_parents=tuple(loss_parents))


class Dag(nn.Module):
    """x_l = tanh(sum over parents of W x_p); the loss is read off some of the layers."""

    def __init__(self, parents: Sequence[Sequence[int]], loss_parents: Sequence[int]) -> None:
        super().__init__()
        self.parents, self.loss_parents = parents, loss_parents
        self.maps = nn.ModuleDict({f"{k}_{p}": nn.Linear(3, 3) for k, row in enumerate(parents) for p in (row or [-1])})
        self.acts = nn.ModuleList(nn.Tanh() for _ in parents)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor] = []
        for k, row in enumerate(self.parents):
            drives = [self.maps[f"{k}_{p}"](x if p < 0 else states[p]) for p in (row or [-1])]
            states.append(self.acts[k](torch.stack(drives).sum(0)))
        return self.out(torch.stack([states[p] for p in self.loss_parents]).sum(0))


@st.composite
def dags(draw: Any) -> tuple[list[list[int]], list[int]]:
    """Every layer leads to the loss."""
    count = draw(st.integers(1, 6))
    parents = [sorted(draw(st.sets(st.integers(0, k - 1), max_size=2))) if k else [] for k in range(count)]
    used = {p for row in parents for p in row}
    return parents, sorted({k for k in range(count) if k not in used} | draw(st.sets(st.integers(0, count - 1))))


@settings(max_examples=25, deadline=None)
@given(dags(), st.integers(1, 8))
# The loss reads the lowest layer too: the second is still where it was when what it is predicted from has moved.
@example(([[], [0], [1], [2], [3]], [0, 4]), 4)
def test_states_that_the_front_calls_unmoved_are_bit_for_bit_those_of_the_forward_pass(
    wired: tuple[list[list[int]], list[int]], steps: int
) -> None:
    """Oracle: Euler steps of the plain engine on any wiring, and the front's own word for what can have moved."""
    torch.manual_seed(0)
    net, x = Dag(*wired).double(), torch.randn(4, 3, dtype=torch.float64)
    seen: list[list[Tensor]] = []

    class Watching(ebm.GradientDescent):
        complex_states: ClassVar[bool] = False

        def relax(self, landscape: Any, start: Any, strength: Any) -> ebm.Relaxation:
            found = super().relax(landscape, start, strength)
            seen.append([*map(torch.clone, start), *map(torch.clone, found.point)])
            return found

    updates = []
    for capture in (False, True):
        algorithm = ebm.algorithm("predictive-coding", relaxer=Watching(lr=0.1, max_steps=steps))
        learner = ebm.Learner(net, algorithm, capture=capture)
        updates.append(learner.gradients(lambda: F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1]))))
    assert learner._captures[0].refused is None
    front = Front(plan(*wired))
    moved: frozenset[int] = frozenset()
    for _ in range(steps):
        moved |= front.reached(moved)
    count = len(wired[0])
    for one, other in zip(*seen, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)
    for states in seen:
        for k in set(range(count)) - moved:
            assert torch.equal(states[k], states[count + k])
        for k in moved:
            assert not torch.equal(states[k], states[count + k])
    assert updates[0].keys() == updates[1].keys()
    for name, update in updates[0].items():
        assert torch.allclose(updates[1][name], update, rtol=0, atol=1e-13)


def test_the_front_of_a_chain_goes_down_a_layer_a_step() -> None:
    front = Front(plan([[], [0], [1], [2], [3], [4]], [5]))
    moved: frozenset[int] = frozenset()
    for step in range(1, 7):
        moved = front.reached(moved)
        assert moved == set(range(6 - step, 6))
    assert front.around([]) == frozenset()
    assert front.around([5]) == {5}
    assert front.around([3, 5]) == {2, 3, 4, 5}  # four steps: sets are kept for 0, 1, 2, 4, ... steps
    assert front.around([0]) is None


def test_a_skip_from_below_carries_the_signal_past_layers() -> None:
    """Layer 2 is computed from layers 0 and 1: when it has moved, both are pulled."""
    front = Front(plan([[], [0], [0, 1]], [2]))
    assert front.reached([]) == {2}
    assert front.reached([2]) == {0, 1, 2}


class Huber(ebm.Energy):
    divergence = True

    def layer_energy(self, state: Tensor, layer: Any) -> Tensor:
        return F.huber_loss(state, layer.prediction, reduction="none", delta=0.05)


ENERGIES: dict[str, Callable[[], ebm.Energy]] = {
    "squares": ebm.PredictiveCoding,
    "precisions": lambda: ebm.PredictiveCoding(precision={"1": 2.0, "3": 0.5, "5": torch.linspace(0.5, 2, 7).double()}),
    "huber": Huber,
    "fenchel-young": ebm.FenchelYoung,
}


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_every_divergence_energy_gives_the_plain_engine_s_energies_and_update(energy: str, steps: int) -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 7), nn.Sigmoid(), nn.Linear(7, 7), nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.Linear(7, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    found = []
    for capture in (False, True):
        relaxer = ebm.GradientDescent(lr=0.05, max_steps=steps)
        learner = ebm.Learner(net, ebm.Algorithm(ENERGIES[energy](), ebm.Centered(0.5), relaxer), capture=capture)
        update = learner.gradients(lambda: F.cross_entropy(net(x), y))
        found.append((update, [phase["energies"] for phase in learner.report["phases"]]))
    assert learner._captures[0].refused is None
    (plain, energies), (fast, others) = found
    for name, value in plain.items():
        assert torch.allclose(fast[name], value, rtol=0, atol=1e-13)
    assert others == [pytest.approx(phase, abs=1e-12) for phase in energies]
