"""Independent oracles of lifted networks with Fenchel-Young energies, on a chain with explicit weights:

    I(x, theta) = sum_l G_l(x_l) + G*_l(a_l) - <x_l, a_l>,   a_l = W_l x_{l-1} + b_l
    minimum in x_l:  x_l = rho_l(a_l + W_{l+1}^T (x_{l+1} - rho_{l+1}(a_{l+1})) - lambda dL/dx_l)
    dI/dW_l = (rho_l(a_l) - x_l) x_{l-1}^T

Zero at the forward pass and positive elsewhere: a single phase suffices.
"""

from __future__ import annotations

from oracles import Gradients, Problem
from oracles_hopfield import Hopfield, affine, forward_states, pull
from oracles_implicit import States


def surprises(chain: Hopfield, problem: Problem, states: States) -> States:
    """x_l - rho_l(a_l)."""
    below = [problem.x, *states[:-1]]
    layers = zip(states, below, chain.weights, chain.biases, chain.activations, strict=False)
    return [x - activation.rho(affine(h, w, b)) for x, h, w, b, activation in layers]


def settle(chain: Hopfield, problem: Problem, lam: float) -> States:
    """The fixed point reached from the forward pass by top-down sweeps, to round-off."""
    states = forward_states(chain, problem)
    for _ in range(2000):
        before = list(states)
        for layer in reversed(range(chain.count)):
            drive = affine(problem.x if layer == 0 else states[layer - 1], chain.weights[layer], chain.biases[layer])
            if layer + 1 < chain.count:
                push = surprises(chain, problem, states)[layer + 1] @ chain.weights[layer + 1].detach()
            elif chain.output == "state":
                push = -lam * pull(problem, states[layer])
            else:
                output = affine(states[layer], chain.weights[-1], chain.biases[-1])
                push = -lam * pull(problem, output) @ chain.weights[-1].detach()
            states[layer] = chain.activations[layer].rho(drive + push)
        change = max((a - b).abs().max().item() for a, b in zip(states, before, strict=True))
        if change <= 1e-16:
            return states
    if not change <= 1e-13:
        raise ArithmeticError(f"no fixed point: still moving by {change:.1e}")
    return states


def update(chain: Hopfield, problem: Problem, states: States, lam: float) -> Gradients:
    """dE/dtheta / lambda at fixed states, in the loss's own reduction."""
    found: Gradients = {}
    errors = surprises(chain, problem, states)
    for layer, name in enumerate(chain.names):
        below = problem.x if layer == 0 else states[layer - 1]
        if layer < chain.count:
            outer = -errors[layer] / lam
        else:
            outer = pull(problem, affine(below, chain.weights[-1], chain.biases[-1]))
        found[f"{name}.weight"] = outer.T @ below / problem.scale
        found[f"{name}.bias"] = outer.sum(0) / problem.scale
    return found


def internal_energy(chain: Hopfield, problem: Problem, states: States) -> float:
    """I, summed over the batch."""
    below = [problem.x, *states[:-1]]
    layers = zip(states, below, chain.weights, chain.biases, chain.activations, strict=False)
    return sum(activation.gap(x, affine(h, w, b)).sum().item() for x, h, w, b, activation in layers)
