"""dx/dlambda at the forward pass: by the errors, layer after layer, against conjugate gradients and a dense solve."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.network.network import Network
from lightning_ebm.updates import linear_response as under_test


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(12, 5), nn.Linear(11, 3)
        self.one, self.two, self.three = nn.Tanh(), nn.Sigmoid(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(self.a(x))
        second = self.two(self.b(first) + first)
        return self.head(torch.cat([self.three(self.c(torch.cat([first, second], 1))), second], 1))


NETS = {
    "a chain": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)),
    "one layer": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    "skips": Skipping,
    "BatchNorm": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    ),
}


def dense(network: Network) -> Tensor:
    """The solution from d2I/dx2 of all states as one matrix, by plain autograd over explicit states."""
    sizes = [state.numel() for state in network.free]

    def internal(flat: Tensor) -> Tensor:
        states = [part.view_as(x) for part, x in zip(flat.split(sizes), network.free, strict=True)]
        by_key = dict(zip(network.keys, states, strict=True))
        return network.internal(network.with_states(lambda key, mu: by_key[key])).sum()

    hessian = torch.autograd.functional.hessian(internal, flattened(network.free))
    slope = flattened(network.loss_slopes([state.clone() for state in network.free]))
    return torch.linalg.solve(hessian, -slope)


def flattened(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("energy", [ebm.PredictiveCoding(), ebm.PredictiveCoding(2.5)])
@pytest.mark.parametrize("net", NETS)
def test_it_solves_the_system_of_all_states(net, energy, monkeypatch):
    torch.manual_seed(0)
    module = NETS[net]().double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    solve = under_test.linear_response

    def noting(network, states):
        found = solve(network, states)
        by_steps = solve(network, [state.clone() for state in states], tol=1e-13)
        seen.append((flattened(found), flattened(by_steps), dense(network)))
        return found

    monkeypatch.setattr("lightning_ebm.updates.cross_derivative.linear_response", noting)

    def closure():
        return F.cross_entropy(module(x), y)

    found = ebm.Learner(module, ebm.algorithm("infinitesimal", energy=energy)).gradients(closure)
    true = ebm.reference.backprop(module, closure)
    assert all(torch.allclose(found[name], true[name], rtol=1e-9, atol=1e-12) for name in true)
    ((at_once, by_steps, expected),) = seen
    assert torch.allclose(at_once, expected, rtol=1e-9, atol=1e-11)
    assert torch.allclose(by_steps, expected, rtol=1e-7, atol=1e-10)
