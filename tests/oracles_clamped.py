"""Independent oracles of rules that hold the output: coupled learning and contrastive Hebbian learning.

Coupled learning holds the output at o -+ eta dL/do (o the free output, loss per sample), settles the rest and
contrasts dI/dtheta. Its limit eta -> 0 is not the gradient of the loss: it is the response of the free
equilibrium to the force K dL/do in place of dL/do, with K the inverse of the output's compliance
S = (d2I/dx2)^-1 restricted to the output.
"""

from __future__ import annotations

from typing import Literal

import torch
from oracles import Chain, Gradients, Problem, energies
from oracles_hopfield import Hopfield, hebbian, pull, settle
from oracles_implicit import Energy, States, compliance, flatten, newton, response
from torch import Tensor

Sides = Literal["both", "positive", "negative"]

# the output's displacement in the two phases of the contrast, in units of -eta dL/do
DISPLACEMENTS: dict[Sides, tuple[int, int]] = {"both": (1, -1), "positive": (1, 0), "negative": (0, -1)}


def coupled(chain: Hopfield, problem: Problem, eta: float, sides: Sides = "both") -> Gradients:
    """[dI/dtheta(towards) - dI/dtheta(away)] / (their distance in eta), in the loss's own reduction."""
    free = settle(chain, problem)
    slope = pull(problem, free[-1])

    def statistic(sign: int) -> Gradients:
        held = free[-1] - sign * eta * slope
        return hebbian(chain, problem, settle(chain, problem, 0.0, free, held=held) if sign else free)

    towards, away = DISPLACEMENTS[sides]
    top, bottom = statistic(towards), statistic(away)
    return {name: (top[name] - bottom[name]) / ((towards - away) * eta * problem.scale) for name in top}


def coupled_predictive_coding(chain: Chain, problem: Problem, eta: float, sides: Sides = "both") -> Gradients:
    """The same with the quadratic energy, whose free state is the forward pass; by Newton's method."""
    free = chain.forward_states(problem.x)
    slope = pull(problem, free[-1])
    names, tensors = zip(*chain.parameters.items(), strict=True)

    def statistic(sign: int) -> tuple[Tensor, ...]:
        held = free[-1] - sign * eta * slope
        rest = newton(lambda s: energies(chain, problem, [*s, held])[0], free[:-1]) if sign else free[:-1]
        return torch.autograd.grad(energies(chain, problem, [*rest, held])[0], tensors)

    towards, away = DISPLACEMENTS[sides]
    pairs = zip(names, statistic(towards), statistic(away), strict=True)
    return {name: (top - bottom) / ((towards - away) * eta * problem.scale) for name, top, bottom in pairs}


def k_weighted_gradient(internal: Energy, states: States, problem: Problem, parameters: Gradients) -> Gradients:
    """-(d2I/dtheta dx) H^-1 P_L' K dL/do, in the loss's own reduction."""
    slope = pull(problem, states[-1]).reshape(-1)
    force = torch.zeros_like(flatten(states))
    force[-len(slope) :] = torch.linalg.solve(compliance(internal, states), slope)
    return {name: g / problem.scale for name, g in response(internal, states, force, parameters).items()}


def cosine(a: Gradients, b: Gradients) -> float:
    dot, aa, bb = (sum((u[name] * v[name]).sum() for name in a) for u, v in ((a, b), (a, a), (b, b)))
    return (dot / (aa * bb).sqrt()).item()
