"""Stationary points and implicit differentiation of any energy, by dense linear algebra.

For tiny nets only. An energy here is a function of a list of states (each (B, D_l)) that returns one number,
summed over the batch; samples may interact. Parameters are read from the closure by autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracles import Gradients
from torch import Tensor

States = list[Tensor]
Energy = Callable[[States], Tensor]
Map = Callable[[States], States]


def flatten(states: States) -> Tensor:
    return torch.cat([state.reshape(-1) for state in states])


def unflatten(flat: Tensor, like: States) -> States:
    pieces = flat.split([state.numel() for state in like])
    return [piece.reshape(state.shape) for piece, state in zip(pieces, like, strict=True)]


def hessian(energy: Energy, states: States) -> tuple[Tensor, Tensor]:
    """(dE/dx, d2E/dx2) over all state coordinates of the batch."""
    flat = flatten([state.detach() for state in states]).requires_grad_()
    (slope,) = torch.autograd.grad(energy(unflatten(flat, states)), flat, create_graph=True)
    rows = [torch.autograd.grad(entry, flat, retain_graph=True)[0] for entry in slope]
    return slope.detach(), torch.stack(rows)


def newton(energy: Energy, start: States, tol: float = 1e-12, steps: int = 60) -> States:
    """The stationary point that Newton's method finds from `start`, which must be near."""
    states = [state.detach() for state in start]
    for _ in range(steps):
        slope, curvature = hessian(energy, states)
        flat = flatten(states) - torch.linalg.solve(curvature, slope)
        states = unflatten(flat, states)
        if slope.abs().max() < tol:
            return states
    raise ArithmeticError(f"Newton: residual {slope.abs().max():.1e} after {steps} steps")


def compliance(energy: Energy, states: States) -> Tensor:
    """S = (d2I/dx2)^-1 restricted to the last state: (N, N) with N its number of coordinates in the batch."""
    _, curvature = hessian(energy, states)
    n = states[-1].numel()
    return torch.linalg.inv(curvature)[-n:, -n:]


def response(energy: Energy, states: States, pull: Tensor, parameters: Gradients) -> Gradients:
    """-(d2I/dtheta dx) (d2I/dx2)^-1 P' pull, with `pull` (shape of all states, flat) a force on the states."""
    _, curvature = hessian(energy, states)
    direction = torch.linalg.solve(curvature, pull)
    leaves = [state.detach().requires_grad_() for state in states]
    slopes = torch.autograd.grad(energy(leaves), leaves, create_graph=True)
    work = (flatten(list(slopes)) * direction).sum()
    names, tensors = zip(*parameters.items(), strict=True)
    found = torch.autograd.grad(work, tensors, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else -g for n, p, g in zip(names, tensors, found, strict=True)}


def implicit_gradient(energy: Energy, loss: Energy, states: States, parameters: Gradients) -> Gradients:
    """d loss(x_bar(theta), theta) / d theta at the stationary point `states` of `energy`:

    the loss's own dependence on theta minus (d2I/dtheta dx) H^-1 dL/dx.
    """
    leaves = [state.detach().requires_grad_() for state in states]
    names, tensors = zip(*parameters.items(), strict=True)
    value = loss(leaves)
    slopes = torch.autograd.grad(value, [*leaves, *tensors], allow_unused=True)
    zeroed = [
        torch.zeros_like(p) if s is None else s.detach() for s, p in zip(slopes, [*leaves, *tensors], strict=True)
    ]
    through = response(energy, states, flatten(zeroed[: len(leaves)]), parameters)
    return {name: through[name] + own for name, own in zip(names, zeroed[len(leaves) :], strict=True)}


def implicit_gradient_of_a_map(step: Map, loss: Energy, states: States, parameters: Gradients) -> Gradients:
    """The same for a fixed point x = F(x, theta): dL/dx (1 - dF/dx)^-1 dF/dtheta. Needs no energy, so kinks
    (clamped units) do no harm.
    """
    flat = flatten([state.detach() for state in states]).requires_grad_()
    image = flatten(step(unflatten(flat, states)))
    jacobian = torch.stack([torch.autograd.grad(entry, flat, retain_graph=True)[0] for entry in image])
    value = loss(unflatten(flat, states))
    names, tensors = zip(*parameters.items(), strict=True)
    slopes = torch.autograd.grad(value, [flat, *tensors], allow_unused=True)
    eye = torch.eye(len(flat), dtype=flat.dtype)
    adjoint = torch.linalg.solve((eye - jacobian).T, slopes[0])
    through = torch.autograd.grad((image * adjoint).sum(), tensors, allow_unused=True)
    return {
        name: sum((g for g in pair if g is not None), torch.zeros_like(p))
        for name, p, pair in zip(names, tensors, zip(through, slopes[1:], strict=True), strict=True)
    }
