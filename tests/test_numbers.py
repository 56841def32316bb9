"""Numbers that Python computes anew at every step cost no new program, and are never those of another step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.evaluations import Forces

STEPS = 20


class Net(nn.Module):
    """What is computed depends on the number of the step."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.act = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Tanh()
        self.step = 0
        self.to(dtype)

    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.a(x))))


def warm_up(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.c(net.hidden(x)) * min(1.0, (net.step + 1) / 15), y)


def weight_of_a_loss(net: Net, x: Tensor, y: Tensor) -> Tensor:
    h = net.hidden(x)
    weight = 0.1 * (1 + net.step)
    return F.cross_entropy(net.c(h), y) + weight * h.square().mean()


def temperature(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.c(net.hidden(x)) / (1.0 + 0.3 * net.step), y)


def whole_numbers(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.c(net.hidden(x * (1 + net.step % 2)) + net.step % 4), y) * (1 + net.step % 3)


def several(net: Net, x: Tensor, y: Tensor) -> Tensor:
    a, b = math.sin(net.step), math.exp(-net.step / 7)
    h = net.hidden(x + a)
    return F.cross_entropy(net.c(h - b) * (1 + b), y) * (1 + a / 2) + h.mean() * b


def written_in_place(net: Net, x: Tensor, y: Tensor) -> Tensor:
    h = net.b(net.act(net.a(x)))
    h *= 1.0 + net.step
    return F.cross_entropy(net.c(net.act(h)), y)


ALL = [warm_up, weight_of_a_loss, temperature, whole_numbers, several, written_in_place]
Loss = Callable[[Net, Tensor, Tensor], Tensor]


def trained(loss: Loss, learns: bool, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Net, Any]:
    net = Net(dtype)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    learner = ebm.Learner(net, options.pop("algorithm", "zero-divergence"), **options) if learns else None
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        net.step = step
        x, y = torch.randn(5, 4, generator=generator).to(dtype), torch.arange(5) % 3
        optimizer.zero_grad()
        if learner is None:
            loss(net, x, y).backward()
        else:
            learner.backward(lambda x=x, y=y: loss(net, x, y))
        optimizer.step()
    return net, learner


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)
def test_a_schedule_trains_as_in_stock_and_is_one_program(loss: Loss, capture: bool) -> None:
    stock, _ = trained(loss, learns=False)
    ours, learner = trained(loss, learns=True, capture=capture)
    for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-10)
    known = learner._programs._known
    assert len(known) <= 2
    assert learner.report["kernels"].startswith("traced" if capture else "plain")


@pytest.mark.parametrize("loss", [warm_up, several], ids=lambda loss: loss.__name__)
def test_states_that_relax_see_the_number_of_now(loss: Loss) -> None:
    """Oracle: the plain way on the record of the very step."""
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 12))
    (one, _), (other, _) = (trained(loss, True, algorithm=algorithm, capture=capture) for capture in (True, False))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-11)


def test_kinds_of_numbers_stay_those_of_the_step() -> None:
    """In float32 a loss of no dimensions times a number stays float32."""
    stock, _ = trained(weight_of_a_loss, False, torch.float32)
    ours, learner = trained(weight_of_a_loss, True, torch.float32)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in ours.parameters())
    for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)
    seen = []

    def look(network: Any) -> Any:
        seen.append(network.evaluate(Forces(), list(network.free), 1.0).loss.dtype)
        return network

    for capture in (True, False):
        net = Net(torch.float32)
        learner = ebm.Learner(net, "zero-divergence", capture=capture)
        learner.observer = look
        for net.step in range(5):
            learner.gradients(lambda net=net: weight_of_a_loss(net, torch.ones(5, 4), torch.arange(5) % 3))
    assert seen == [torch.float32] * 10


def test_beside_a_loss_of_half_precision_a_number_keeps_its_digits() -> None:
    """70000 is infinite in float16, and 0.3 is 0.30078125 in bfloat16; torch multiplies by the numbers themselves."""
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    for dtype, weight in ((torch.float16, 7e4), (torch.bfloat16, 0.3)):
        found = []
        for capture in (None, True, False):
            net = Net(dtype)
            learner = None if capture is None else ebm.Learner(net, "zero-divergence", capture=capture)
            losses = []

            def closure(net: Net = net, dtype: torch.dtype = dtype, weight: float = weight) -> Tensor:
                off = F.mse_loss(net.c(net.hidden(x.to(dtype))), y.to(dtype)) * 0.01
                return off * (weight * (1 + 0.01 * net.step))

            for net.step in range(5):
                losses.append(float(closure() if learner is None else learner.backward(closure)))
            found.append(losses)
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("capture", [True, False])
def test_a_truth_value_or_another_kind_of_number_is_another_program(capture: bool) -> None:
    """1, 1.0 and True are equal to Python, and not to torch: what they make of whole numbers differs."""
    factors = [1, 1.0, True, 2, 2.0, 1, 1.0]
    net = Net()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    x, y, counts = torch.randn(5, 4).double(), torch.arange(5) % 3, torch.arange(15).view(5, 3)
    for factor in factors:

        def loss(factor: Any = factor) -> Tensor:
            kinds = counts * factor
            h = net.c(net.hidden(x)) * factor
            return F.cross_entropy(h + (kinds.dtype is torch.float32) * 0.5 * h.square(), y)

        found = learner.gradients(loss)
        true = torch.autograd.grad(loss(), list(net.parameters()))
        for gradient, wanted in zip(found.values(), true, strict=True):
            assert torch.allclose(gradient, wanted, rtol=0, atol=1e-12)
