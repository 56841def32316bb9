"""Independent oracle of predictive coding by an augmented Lagrangian:

    L_rho(x, mu) = loss + sum_l <mu_l, eps_l> + 1/2 rho |eps_l|^2,   eps_l = x_l - f_l(x_{l-1})
    repeat:  x <- argmin_x L_rho(x, mu);   mu <- mu + rho eps;   gradient estimate  -(df/dtheta)^T mu

with the loss summed over samples; the estimate is handed out in the loss's own reduction.
"""

from __future__ import annotations

import torch
from oracles import Chain, Gradients, Problem
from oracles_implicit import States, newton
from torch import Tensor


def augmented_lagrangian(chain: Chain, problem: Problem, rho: float, outer_steps: int) -> list[Gradients]:
    """The estimate after each outer step, with the inner problem solved by Newton's method."""
    names, tensors = zip(*chain.parameters.items(), strict=True)
    states = chain.forward_states(problem.x)
    multipliers = [torch.zeros_like(state) for state in states]

    def errors(s: States) -> list[Tensor]:
        return [x - mu for x, mu in zip(s, chain.run(problem.x, s)[0], strict=True)]

    def lagrangian(s: States) -> Tensor:
        constraints = zip(errors(s), multipliers, strict=True)
        penalty = sum((m * e).sum() + 0.5 * rho * e.square().sum() for e, m in constraints)
        return problem.summed_loss(chain.run(problem.x, s)[2]) + penalty

    found = []
    for _ in range(outer_steps):
        states = newton(lagrangian, states)
        # d/dtheta of the Lagrangian at fixed states: the loss's own share (a read-out) and the constraints'
        slopes = torch.autograd.grad(lagrangian(states), tensors)
        found.append({name: slope / problem.scale for name, slope in zip(names, slopes, strict=True)})
        multipliers = [(m + rho * e).detach() for m, e in zip(multipliers, errors(states), strict=True)]
    return found


def linear_rate(chain: Chain, rho: float) -> float:
    """s / (s + rho) with s the largest eigenvalue of S = sum_k J_{L<-k} J_{L<-k}^T over the layers with a state:
    the factor per outer step of a linear chain under 1/2 |o - y|^2.
    """
    jacobian = torch.eye(chain.weights[-1].shape[0], dtype=chain.weights[0].dtype)
    jacobians = [jacobian]
    for weight in reversed(chain.weights[1:]):
        jacobians.append(jacobians[-1] @ weight.detach())
    with_state = jacobians if chain.output == "state" else jacobians[1:]
    top = torch.linalg.eigvalsh(sum(j @ j.T for j in with_state))[-1].item()
    return top / (top + rho)
