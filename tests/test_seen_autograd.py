"""What the user's code asks of autograd: hooks on nodes, on several tensors, and `torch.autograd.backward`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F

import lightning_ebm as ebm

LATE = 4


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.arange(5) % 3


def steps(change: Callable[[Tensor, int], Tensor], capture: bool = True, count: int = 8) -> None:
    """Each update is backprop's, through what `change` makes of a hidden tensor; or it is refused."""
    net = net_of()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(count):
        x, y = batch(index)

        def loss(x: Tensor = x, y: Tensor = y, index: int = index) -> Tensor:
            return F.cross_entropy(net[2:](change(net[:2](x), index)), y)

        found = learner.gradients(loss)
        true = torch.autograd.grad(loss(), list(net.parameters()))
        for gradient, wanted in zip(found.values(), true, strict=True):
            assert torch.allclose(gradient, wanted, rtol=0, atol=1e-12)


def on_the_node(given: Callable[[Tensor], Tensor], late: int) -> Callable[[Tensor, int], Tensor]:
    def change(h: Tensor, index: int) -> Tensor:
        middle = h * 2.0
        if index >= late:
            assert middle.grad_fn is not None
            middle.grad_fn.register_prehook(lambda slopes: (given(slopes[0]), *slopes[1:]))
        return middle

    return change


def on_the_results(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        edge = torch.autograd.graph.get_gradient_edge(middle)
        edge.node.register_hook(lambda slopes, _: (0.3 * slopes[0], *slopes[1:]))
    return middle


def on_a_node_behind(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        assert middle.grad_fn is not None
        middle.grad_fn.next_functions[0][0].register_hook(lambda slopes, _: (0.3 * slopes[0], *slopes[1:]))
    return middle


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    "change",
    [on_the_node(lambda s: 0.3 * s, 0), on_the_node(lambda s: 0.3 * s, LATE), on_the_results, on_a_node_behind],
    ids=["from the start", "late", "by its edge", "behind"],
)
def test_a_hook_on_a_node_that_changes_gradients_is_refused(change: Any, capture: bool) -> None:
    """Whenever it begins: also where the program has been known for long."""
    with pytest.raises(ebm.UnsupportedModuleError, match="grad_fn"):
        steps(change, capture)


@pytest.mark.parametrize("capture", [True, False])
def test_a_hook_on_a_node_that_only_looks_is_let_be(capture: bool) -> None:
    seen: list[float] = []

    def look(slope: Tensor) -> Tensor:
        seen.append(float(slope.abs().sum()))
        return slope

    steps(on_the_node(look, 0), capture)
    assert seen


def test_hooks_on_several_hidden_tensors_are_refused() -> None:
    told: list[Any] = []

    def change(h: Tensor, index: int) -> Tensor:
        middle = h * 2.0
        register_multi_grad_hook((h, middle), told.append)
        return middle

    with pytest.raises(ebm.UnsupportedModuleError, match="register_multi_grad_hook"):
        steps(change)


@pytest.mark.parametrize("mode", ["all", "any"])
def test_hooks_on_several_parameters_are_told_of_the_update(mode: Any) -> None:
    net, told = net_of(), []
    learner = ebm.Learner(net, "zero-divergence")
    for index in range(5):
        x, y = batch(index)
        told.clear()
        handle = register_multi_grad_hook((net[0].weight, net[2].weight), told.append, mode=mode)
        learner.backward(lambda x=x, y=y: F.cross_entropy(net(x), y))
        handle.remove()
        assert len(told) == 1
        if mode == "all":
            assert torch.allclose(told[0][0], torch.autograd.grad(F.cross_entropy(net(x), y), net[0].weight)[0])
        net.zero_grad()


@pytest.mark.parametrize("how", [lambda a: torch.autograd.backward(a), lambda a: torch.autograd.backward([a])])
@pytest.mark.parametrize("late", [0, LATE])
def test_backward_as_a_function_in_a_closure_is_refused(how: Callable[[Tensor], None], late: int) -> None:
    net = net_of()
    learner = ebm.Learner(net, "zero-divergence")

    def closure(x: Tensor, y: Tensor, index: int) -> Tensor:
        loss = F.cross_entropy(net(x), y)
        if index >= late:
            how(F.cross_entropy(net(x), y) + net[0].weight.square().sum())
        return loss

    for index in range(late):
        learner.backward(lambda index=index: closure(*batch(index), index))
    with pytest.raises(ebm.ConfigurationError, match="backward"):
        learner.backward(lambda: closure(*batch(late), late))


def test_backward_as_a_function_on_given_inputs_is_let_pass() -> None:
    net = net_of()
    learner = ebm.Learner(net, "zero-divergence")
    for index in range(4):
        x, y = batch(index)
        bad = x.clone().requires_grad_()

        def closure(y: Tensor = y, bad: Tensor = bad) -> Tensor:
            torch.autograd.backward(F.cross_entropy(net(bad), y), inputs=[bad])
            assert bad.grad is not None
            return F.cross_entropy(net((bad + 0.1 * bad.grad.sign()).detach()), y)

        net.zero_grad()
        learner.backward(closure)
        found = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        bad.grad = None
        closure().backward()
        for gradient, p in zip(found, net.parameters(), strict=True):
            assert torch.allclose(gradient, p.grad, rtol=0, atol=1e-12)


def test_torch_is_as_it_was_when_nothing_records() -> None:
    before = torch.autograd.backward
    steps(lambda h, index: h, count=2)
    assert torch.autograd.backward is before
    with pytest.raises(ebm.UnsupportedModuleError):
        steps(on_the_results)
    assert torch.autograd.backward is before
