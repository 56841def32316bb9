"""The exact rule in one pass: what the signal meets on its way down is worked out once, for errors and update.

The oracle is stock backprop of an untouched copy: its gradient, and the calls of torch that it takes.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_ebm as ebm
from lightning_ebm.network.network import Network
from lightning_ebm.updates.base import End, Term
from lightning_ebm.updates.first_arrival import FirstArrival


class Attention(nn.Module):
    """A block of a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.mixed, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mixed(self.norms[0](x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class Branched(nn.Module):
    """A residual block of convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(self.one(x)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
        (6,),
    ),
    "attention": (lambda: nn.Sequential(Attention(), Attention(), nn.Flatten(), nn.Linear(40, 3)), (5, 8)),
    "batch norm, residual": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), Branched(), nn.MaxPool2d(2), Branched(), nn.Flatten(), nn.Linear(27, 3)
        ),
        (2, 8, 8),
    ),
}
COUNTED = ("mm", "addmm", "convolution", "attention", "norm", "tanh", "gelu", "threshold", "pool", "softmax", "nll")


class Calls(TorchDispatchMode):
    """Counts what takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if any(word in name for word in COUNTED):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[name]
    return make().double(), torch.randn(4, *shape, dtype=torch.double), torch.arange(4) % 3


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", NETS)
def test_a_step_of_the_exact_rule_takes_the_calls_of_a_step_of_backprop(name: str) -> None:
    net, x, y = made(name)
    stock = copy.deepcopy(net)
    learner = ebm.Learner(net, "zero-divergence")
    for _ in range(3):
        net.zero_grad()
        with Calls() as ours:
            learner.backward(lambda: F.cross_entropy(net(x), y))
    assert learner.report["kernels"].startswith("traced")
    with Calls() as theirs:
        F.cross_entropy(stock(x), y).backward()
    assert ours.counts == theirs.counts
    assert apart(gradients(net), gradients(stock)) < 1e-12


@pytest.mark.parametrize("precision", [1.0, 4.0, {"1": 0.5}], ids=["1", "4", "one layer's"])
@pytest.mark.parametrize("strength", [1.0, 0.3, 1e-3, -2.0])
@pytest.mark.parametrize("capture", [True, False])
def test_at_any_nudge_and_precision(strength: float, precision: object, capture: bool) -> None:
    net, x, y = made("perceptron")
    stock = copy.deepcopy(net)
    energy, nudge = ebm.PredictiveCoding(precision), ebm.OneSided(strength)
    learner = ebm.Learner(net, ebm.Algorithm(energy, nudge, ebm.Sweep()), capture=capture)
    for _ in range(3):
        net.zero_grad()
        learner.backward(lambda: F.cross_entropy(net(x), y))
    F.cross_entropy(stock(x), y).backward()
    assert apart(gradients(net), gradients(stock)) < 1e-12
    (phase,) = learner.report["phases"]
    assert phase["energies"] == pytest.approx([strength * 4 * F.cross_entropy(stock(x), y).item()])


class Signs(FirstArrival):
    """Of a user: `-1/lambda <sign d_l, dmu_l/dtheta>`, which is linear in the loss no more."""

    name: ClassVar[str] = "signs"

    def read(self, network: Network, ends: Sequence[End]) -> list[Term]:
        signs = [[d.sign() for d in network.errors_at(end.found)] for end in ends]
        found = [end._replace(found=network.at_rest(sign)) for end, sign in zip(ends, signs, strict=True)]
        return network.terms_of(found)


class Signed(ebm.Sweep):
    update = Signs()


def by_hand(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Signs of the signal at each activation, times the slope of its layer; the loss's own at the last."""
    states, inputs = [], x
    for first, activation in ((net[0], net[1]), (net[2], net[3])):
        states.append((inputs, activation(first(inputs))))
        inputs = states[-1][1].detach().requires_grad_()
    loss = F.cross_entropy(net[4](inputs), y)
    loss.backward(inputs=[inputs, *net[4].parameters()])
    top = inputs.grad
    (below,) = torch.autograd.grad(states[1][1], states[1][0], top, retain_graph=True)
    states[1][1].backward(top.sign() / len(x), inputs=list(net[2].parameters()))
    states[0][1].backward(below.sign() / len(x), inputs=list(net[0].parameters()))
    return gradients(net)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_an_update_that_is_not_linear_in_the_errors_is_read_off_them(capture: bool, factor: float) -> None:
    """A subclass that reads otherwise no longer keeps its parent's promise; a factor on the loss is not the nudge's."""
    net, x, y = made("perceptron")
    expected = {name: factor * g for name, g in by_hand(copy.deepcopy(net), x, y).items()}
    algorithm = ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(1.0), Signed())
    learner = ebm.Learner(net, algorithm, capture=capture, scale=factor)
    for _ in range(3):
        net.zero_grad()
        learner.backward(lambda: factor * F.cross_entropy(net(x), y))
    assert apart(gradients(net), expected) < 1e-12


def test_errors_that_stand_behind_something_else_are_its_own() -> None:
    """Feedback in front of the network: the signal goes back through other weights, by code as without."""
    found = []
    for capture in (True, False):
        net, x, y = made("perceptron")
        relaxer = ebm.Feedback(ebm.Sweep(), ebm.RandomFeedback(seed=0))
        learner = ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(1.0), relaxer), capture=capture)
        for _ in range(3):
            net.zero_grad()
            learner.backward(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        found.append(gradients(net))
        exact = copy.deepcopy(net)
        exact.zero_grad()
        F.cross_entropy(exact(x), y).backward()
        assert apart(found[-1], gradients(exact)) > 1e-2
    assert apart(*found) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
def test_both_ways_round_alike(name: str, dtype: torch.dtype) -> None:
    """Bit by bit, at a number of samples that no power of 2 is: a resumed run begins the plain way."""
    found = []
    for capture in (True, False):
        torch.manual_seed(0)
        make, shape = NETS[name]
        net, x, y = make().to(dtype), torch.randn(7, *shape, dtype=dtype), torch.arange(7) % 3
        learner = ebm.Learner(net, "zero-divergence", capture=capture)
        for _ in range(3):
            net.zero_grad()
            learner.backward(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        found.append(gradients(net))
    assert all(torch.equal(found[0][parameter], found[1][parameter]) for parameter in found[0])
