"""What the user's code asks of autograd: hooks on nodes, on several tensors, and `torch.autograd.backward`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("capture", [True, False])
def test_operations_are_counted_in_a_pass_of_their_own(capture: bool) -> None:
    """torch's counter puts such hooks on what modules return: refused around a step, and with a remedy that works."""
    net = net_of()
    learner, (x, y) = ebm.Learner(net, "zero-divergence", capture=capture), batch(0)
    with (
        pytest.raises(ebm.UnsupportedModuleError, match=r"FlopCounterMode.*torch\.no_grad"),
        FlopCounterMode(display=False),
    ):
        learner.gradients(lambda: F.cross_entropy(net(x), y))
    found: list[int] = []

    def counting() -> Tensor:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        found.append(counter.get_total_flops())
        return F.cross_entropy(net(x), y)

    true = ebm.reference.backprop(net, lambda: F.cross_entropy(net(x), y))
    for _ in range(3):
        for name, gradient in learner.gradients(counting).items():
            torch.testing.assert_close(gradient, true[name], rtol=1e-10, atol=1e-12)
    assert found == [2 * len(x) * sum(p.numel() for p in net.parameters() if p.ndim == 2)] * 3


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


def updates(algorithm: str, capture: bool, hook: Callable[[Tensor], Any] | None, hooked: Callable[[str], bool]) -> Any:
    """Gradients of four batches, and how often hooks were called in each."""
    torch.manual_seed(0)
    act = nn.Tanh if algorithm in ("holomorphic-ep", "infinitesimal") else nn.Hardsigmoid
    net = nn.Sequential(nn.Linear(4, 8), act(), nn.Linear(8, 6), act(), nn.Linear(6, 3)).double()
    called: list[str] = []
    for name, parameter in net.named_parameters():
        if hook is not None and hooked(name):

            def one(gradient: Tensor, name: str = name) -> Any:
                called.append(name)
                return hook(gradient)

            parameter.register_hook(one)
    learner, found, counts = ebm.Learner(net, algorithm, capture=capture), [], []
    for index in range(4):
        net.zero_grad()
        torch.manual_seed(index)
        x, y = batch(index)
        target = F.one_hot(y, 3).double()
        learner.backward(lambda x=x, target=target: 0.5 * (net(x) - target).square().sum(1).mean())
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        counts.append(sorted(called))
        called.clear()
    return found, counts


HOOKED: dict[str, Callable[[str], bool]] = {
    "all of them": lambda name: True,
    "biases": lambda name: "bias" in name,
}


@pytest.mark.crossed(3)
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("which", HOOKED)
@pytest.mark.parametrize("algorithm", ebm.algorithms())
def test_hooks_on_parameters_act_once_and_on_the_update(algorithm: str, which: str, capture: bool) -> None:
    """As gradients are clipped by hooks, or watched by loggers; against the same rule without hooks."""
    hooked = HOOKED[which]
    plain, _ = updates(algorithm, capture, None, hooked)
    clipped, counts = updates(algorithm, capture, lambda g: g.clamp(-0.01, 0.01), hooked)
    seen, again = updates(algorithm, capture, lambda g: None, hooked)
    for without, clamped, looked, names in zip(plain, clipped, seen, counts, strict=True):
        assert names == sorted(name for name in without if hooked(name))
        for name, gradient in without.items():
            wanted = gradient.clamp(-0.01, 0.01) if hooked(name) else gradient
            assert torch.equal(clamped[name], wanted)
            assert torch.equal(looked[name], gradient)
    assert again == counts


@pytest.mark.parametrize("capture", [True, False])
def test_the_first_step_is_checked_where_every_parameter_has_a_hook(capture: bool) -> None:
    """A hook on a node that changes gradients is found, though no parameter is without a hook of its own."""
    net = net_of()
    for parameter in net.parameters():
        parameter.register_hook(lambda g: g)

    def loss() -> Tensor:
        h = net[:2](batch(0)[0])
        h.grad_fn.register_prehook(lambda g: (2 * g[0],))
        return F.cross_entropy(net[2:](h), batch(0)[1])

    with pytest.raises(ebm.UnsupportedModuleError, match="grad_fn"):
        ebm.Learner(net, "zero-divergence", capture=capture).gradients(loss)
