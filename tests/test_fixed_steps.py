"""A given number of steps by code that takes the whole step: against the plain way, that evaluates, then moves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.program.code import Code
from lightning_ebm.step.report import Report


def chain(width: int, activation: Callable[[], nn.Module], depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [layer for _ in range(depth) for layer in (nn.Linear(width, width), activation())]
    return nn.Sequential(*blocks, nn.Linear(width, 3)).double()


def outcome(relaxer: ebm.Relaxer, nudge: ebm.Nudge, capture: bool, steepness: float) -> str | Report:
    """The report of the third step, or what was said when it ran away; the weights grow before it."""
    net = chain(4, nn.Tanh)
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=relaxer, nudge=nudge), capture=capture)
    for number in range(3):
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
        if number == 2:
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(steepness)
        try:
            learner.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y))
        except ebm.RelaxationDivergedError as error:
            return str(error)
    return learner.report


@pytest.mark.crossed(3)
@pytest.mark.parametrize("kind", [ebm.GradientDescent, ebm.ErrorCoordinates])
@pytest.mark.parametrize("nudge", [ebm.OneSided(1.0), ebm.OneSided(-0.1), ebm.Centered(0.1)], ids=str)
@pytest.mark.parametrize("max_steps", [1, 2, 4, 12])
def test_what_is_measured_and_what_is_refused_is_what_the_plain_way_says(kind, nudge, max_steps) -> None:
    """Over step sizes and steepnesses on both sides of stability."""
    ended = set()
    for lr in (0.1, 0.5, 0.9, 1.3):
        for steepness in (1.0, 3.0):
            options = {"lr": lr, "max_steps": max_steps} | ({"tol": 0.0} if kind is ebm.ErrorCoordinates else {})
            plain, found = (outcome(kind(**options), nudge, capture, steepness) for capture in (False, True))
            ended.add(isinstance(plain, str))
            if isinstance(plain, str):
                assert found == plain
                continue
            assert not isinstance(found, str)
            for one, other in zip(plain["phases"], found["phases"], strict=True):
                assert one["status"] == other["status"]
                assert one["steps"] == other["steps"] == max_steps
                for name, number in one.items():
                    if isinstance(number, float):
                        assert other[name] == pytest.approx(number, rel=1e-9, abs=1e-12), name
    assert max_steps < 12 or ended == {True, False}


def gradients(net: nn.Module, nudge: ebm.Nudge, capture: bool) -> dict[str, Tensor]:
    learner = ebm.Learner(
        net, ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 6), nudge=nudge), capture=capture
    )
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(512, 64, dtype=torch.float64, generator=generator), torch.arange(512) % 3
        found = learner.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y))
    if capture:
        codes = learner._programs.latest.traced.codes.values()
        assert codes
        assert all(isinstance(code, Code) for code in codes)
    return found


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("nudge", [ebm.OneSided(1.0), ebm.Centered(0.1)], ids=str)
def test_large_batches_move_the_same(activation, nudge) -> None:
    net = chain(64, activation)
    plain, found = (gradients(net, nudge, capture) for capture in (False, True))
    for name, gradient in plain.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-13), name


def test_an_update_is_used_up_when_it_is_read_unless_its_graph_is_kept() -> None:
    net = chain(4, nn.Tanh)
    parameters = list(net.parameters())
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 6)))
    for _ in range(2):
        step = learner.begin(lambda: F.cross_entropy(net(x), y))
        with step.first_pass():
            loss = F.cross_entropy(net(x), y)
        surrogate = step.surrogate(loss)
        kept = torch.autograd.grad(surrogate, parameters, retain_graph=True)
        last = torch.autograd.grad(surrogate, parameters)
        assert all(torch.equal(one, other) for one, other in zip(kept, last, strict=True))
        with pytest.raises(RuntimeError, match="retain_graph"):
            torch.autograd.grad(surrogate, parameters)
        step.release()


def test_the_point_handed_over_is_moved_and_whoever_holds_its_tensors_keeps_them() -> None:
    net = chain(4, nn.Tanh)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    class Holding(ebm.GradientDescent):
        def relax(self, landscape, start, strength):
            before = [*start]
            seen.append((before, [x.clone() for x in before]))
            found = super().relax(landscape, start, strength)
            assert all(x is not y for x, y in zip(found.point, before, strict=True))
            return found

    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=Holding(0.1, 6)))
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    for _ in range(3):
        learner.gradients(lambda: F.cross_entropy(net(x), y))
    assert len(seen) == 3
    for before, copies in seen:
        assert all(torch.equal(one, other) for one, other in zip(before, copies, strict=True))


class Rounds(torch.autograd.Function):
    """The same but for a rounding error, which appears after some calls, as where other kernels compute it."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        Rounds.calls += 1
        return x * (1 + 2.0**-23) if Rounds.calls > 4 else x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_where_a_batch_pulls_at_nothing_rounding_is_no_runaway(scale):
    """Under a loss of zero, as in a warm-up of its weight, forces begin at 0: any rounding is infinitely more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3

    def closure():
        Rounds.calls = 0
        return scale * F.cross_entropy(net[4](net[3](Rounds.apply(net[2](net[1](net[0](x)))))), y)

    learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 6)))
    for _ in range(2):  # in the second nothing is checked, and calls are those of the relaxation
        update = learner.gradients(closure)
    assert learner.report["result"] == "fixed"
    assert Rounds.calls > 6
    assert max(float(g.abs().max()) for g in update.values()) < (1e-5 if not scale else 1.0)
