"""Two updates as one writes them in plain torch, with no library: what the library's have to equal, and to beat."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def predictive_coding(net: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    """Adds the update of a chain of tanh layers to `.grad`: lambda = 1, so many Euler steps on the states.

    Energies, and their gradients by autograd at every step.
    """
    assert isinstance(net, nn.Sequential)
    blocks: list[nn.Sequential] = [nn.Sequential()]
    for layer in net:
        blocks[-1].append(layer)
        if isinstance(layer, nn.Tanh):
            blocks.append(nn.Sequential())

    def energy(states: list[Tensor]) -> Tensor:
        inputs = [x, *states]
        errors = [state - block(a) for block, a, state in zip(blocks, inputs, states, strict=False)]
        internal: Tensor = torch.stack([0.5 * e.square().sum() for e in errors]).sum()
        return internal + len(x) * F.cross_entropy(blocks[-1](inputs[-1]), y)

    states, hidden = [], x
    with torch.no_grad():
        for block in blocks[:-1]:
            hidden = block(hidden)
            states.append(hidden)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for _ in range(steps):
        states = [state.detach().requires_grad_() for state in states]
        slopes = torch.autograd.grad(energy(states), states)
        states = [state - lr * slope for state, slope in zip(states, slopes, strict=True)]
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    torch.autograd.backward(energy([state.detach() for state in states]) / len(x))


@torch.no_grad()
def equilibrium_propagation(net: nn.Module, x: Tensor, y: Tensor, free: int, nudged: int, beta: float = 0.25) -> None:
    """Adds the centered update of a chain of layers min(max(a, 0), 1) to `.grad`: sweeps, free and at each sign.

    Odd layers first, then even, each to rho(a_l + W_{l+1}' x_{l+1}); the last to rho(a_L - beta dL/dx_L).
    """
    *hidden, head = (module for module in net.modules() if isinstance(module, nn.Linear))
    first, labels = hidden[0](x), F.one_hot(y, head.out_features).to(x.dtype)  # the drive of a clamped input stays

    def sweeps(states: list[Tensor], count: int, strength: float) -> list[Tensor]:
        states = list(states)
        order = [*range(0, len(states), 2), *range(1, len(states), 2)]
        for _ in range(count):
            for k in order:
                drive = hidden[k](states[k - 1]) if k else first
                if k + 1 < len(states):
                    drive = torch.addmm(drive, states[k + 1], hidden[k + 1].weight)
                elif strength:
                    wrong = head(states[k]).softmax(-1) - labels
                    drive = torch.addmm(drive, wrong, head.weight, alpha=-strength)
                states[k] = drive.clamp(0, 1)
        return states

    start = [first.clamp(0, 1)]
    for layer in hidden[1:]:
        start.append(layer(start[-1]).clamp(0, 1))
    resting = sweeps(start, free, 0.0)
    for strength in (beta, -beta):
        states = sweeps(resting, nudged, strength)
        share = 1 / (2 * strength * len(x))
        wrong = head(states[-1]).softmax(-1) - labels
        for layer, (below, above) in zip(hidden, pairwise([x, *states]), strict=True):
            _add(layer, above, below, -share)
        _add(head, wrong, states[-1], beta * abs(share))


def _add(layer: nn.Linear, above: Tensor, below: Tensor, factor: float) -> None:
    for parameter, slope in ((layer.weight, above.T @ below), (layer.bias, above.sum(0))):
        parameter.grad = slope.mul_(factor) if parameter.grad is None else parameter.grad.add_(slope, alpha=factor)


def euler(steps: int, lr: float) -> Callable[[nn.Module, Tensor, Tensor], None]:
    """`predictive_coding` with so many steps."""
    return lambda net, x, y: predictive_coding(net, x, y, steps, lr)


def swept(free: int, nudged: int) -> Callable[[nn.Module, Tensor, Tensor], None]:
    """`equilibrium_propagation` with so many sweeps."""
    return lambda net, x, y: equilibrium_propagation(net, x, y, free, nudged)
