"""Independent oracle of dual propagation: dyads, a difference and a mean per neuron, on a chain.

    z_l^+- = rho(W_l zbar_{l-1} + b_l +- 1/2 W_{l+1}^T (z_{l+1}^+ - z_{l+1}^-)),   zbar = (z^+ + z^-) / 2
    z_L^+- = rho_L(a_L -+ beta/2 dL/do(zbar_L))

and the gradient estimate (z_l^- - z_l^+) zbar_{l-1}^T / beta, in the loss's own reduction.
"""

from __future__ import annotations

from oracles import Gradients, Problem
from oracles_hopfield import Hopfield, affine, pull
from torch import Tensor


def dyads(chain: Hopfield, problem: Problem, beta: float, passes: int = 60) -> Gradients:
    """Settled by alternating passes, top-down within each, from the forward pass (difference 0)."""
    count = len(chain.weights)
    plus, h = [], problem.x
    for weight, bias, activation in zip(chain.weights, chain.biases, chain.activations, strict=True):
        h = activation.rho(affine(h, weight, bias))
        plus.append(h)
    minus = list(plus)

    def mean(layer: int) -> Tensor:
        return problem.x if layer < 0 else 0.5 * (plus[layer] + minus[layer])

    for _ in range(passes):
        for layer in reversed(range(count)):
            drive = affine(mean(layer - 1), chain.weights[layer], chain.biases[layer])
            if layer == count - 1:
                push = -0.5 * beta * pull(problem, mean(layer))
            else:
                push = 0.5 * (plus[layer + 1] - minus[layer + 1]) @ chain.weights[layer + 1].detach()
            rho = chain.activations[layer].rho
            plus[layer], minus[layer] = rho(drive + push), rho(drive - push)
    found: Gradients = {}
    for layer, name in enumerate(chain.names):
        delta = (minus[layer] - plus[layer]) / (beta * problem.scale)
        found[f"{name}.weight"], found[f"{name}.bias"] = delta.T @ mean(layer - 1), delta.sum(0)
    return found
