"""Independent oracle of predictive coding with fixed predictions: predictions, Jacobians, presynaptic values
and the loss's slope all stay those of the forward pass; only the errors move,

    eps_l <- eps_l + eta (-eps_l + J_{l+1}^T eps_{l+1}),   top: J^T eps replaced by -lambda dL/dx,

and the estimate is -(df_l/dtheta)^T eps_l / lambda. All of it is linear in lambda.
"""

from __future__ import annotations

import torch
from oracles import Chain, Gradients, Problem


def fixed_prediction(chain: Chain, problem: Problem, lam: float, eta: float, steps: int) -> Gradients:
    """`steps` simultaneous Euler steps of the errors from 0, in the loss's own reduction."""
    start = [state.requires_grad_() for state in chain.forward_states(problem.x)]
    predictions, _, output = chain.run(problem.x, start)
    loss = problem.summed_loss(output)
    errors = [torch.zeros_like(state) for state in start]
    for _ in range(steps):
        overlap = sum((mu * e).sum() for mu, e in zip(predictions, errors, strict=True))
        arriving = torch.autograd.grad(overlap - lam * loss, start, retain_graph=True)
        errors = [e + eta * (a - e) for e, a in zip(errors, arriving, strict=True)]
    names, tensors = zip(*chain.parameters.items(), strict=True)
    overlap = sum((mu * e).sum() for mu, e in zip(predictions, errors, strict=True))
    slopes = torch.autograd.grad(lam * loss - overlap, tensors)
    return {name: slope / (lam * problem.scale) for name, slope in zip(names, slopes, strict=True)}
