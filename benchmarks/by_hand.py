"""Predictive coding as one writes it in plain torch: energies, and their gradients by autograd at every step."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def by_hand(net: nn.Sequential, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    """Adds the update of a chain of tanh layers to `.grad`: lambda = 1, so many Euler steps on the states."""
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
