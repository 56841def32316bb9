"""Independent oracles for layered Hopfield energies: equilibrium propagation, contrastive Hebbian and coupled
learning as their papers write them, with explicit weights and their transposes. No autograd in the dynamics
and none in the Hebbian statistic.

    I(x, theta) = sum_l gamma^(l-L) [ G_l(x_l) - <x_l, W_l x_{l-1} + b_l> ],   G_l' = rho_l^-1
    x_l <- rho_l(W_l x_{l-1} + b_l + gamma W_{l+1}^T x_{l+1} - [l = L] lambda dL/dx_L)

The output is a "state" (rho_L its activation, the identity for a linear output) or a "readout": then the loss
pulls at x_{L-1} through W_L, and dE/dW_L is the loss's own. A statistic is summed over the batch; a contrast
is in the loss's own reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from oracles import Gradients, Output, Problem, make_net
from oracles_activations import IDENTITY, Activation, activation_of
from torch import Tensor, nn

States = list[Tensor]
Order = Literal["odd-even", "synchronous"]


@dataclass
class Hopfield:
    """Explicit tensors of a chain of (linear map, activation) blocks."""

    weights: list[Tensor]
    biases: list[Tensor]
    activations: list[Activation]
    names: list[str]
    output: Output = "state"
    gamma: float = 1.0

    @classmethod
    def copy_of(cls, net: nn.Sequential, output: Output = "state", gamma: float = 1.0) -> Hopfield:
        chain = cls([], [], [], [], output, gamma)
        for index, module in enumerate(net):
            if isinstance(module, nn.Linear):
                chain.weights.append(module.weight.detach().clone().requires_grad_())
                chain.biases.append(module.bias.detach().clone().requires_grad_())
                chain.activations.append(IDENTITY)
                chain.names.append(str(index))
            else:
                chain.activations[-1] = activation_of(module)
        return chain

    @property
    def parameters(self) -> Gradients:
        pairs = zip(self.names, self.weights, self.biases, strict=True)
        return {f"{n}.{kind}": p for n, w, b in pairs for kind, p in (("weight", w), ("bias", b))}

    @property
    def count(self) -> int:
        """The number of layers with a state."""
        return len(self.weights) - (self.output == "readout")


# -------------------------------------------------------------------------------------------------- dynamics


def pull(problem: Problem, output: Tensor) -> Tensor:
    """dL/do per sample: o - y for 1/2 |o - y|^2, softmax(o) - onehot for cross-entropy; holomorphic in o."""
    if problem.y.dtype == torch.long:
        top = output.real.amax(-1, keepdim=True)
        weights = torch.exp(output - top)
        return weights / weights.sum(-1, keepdim=True) - nn.functional.one_hot(problem.y, output.shape[-1])
    return output - problem.y


def affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return h @ weight.detach().to(h.dtype).T + bias.detach().to(h.dtype)


def forward_states(chain: Hopfield, problem: Problem) -> States:
    states, h = [], problem.x
    for weight, bias, activation in list(zip(chain.weights, chain.biases, chain.activations, strict=True))[
        : chain.count
    ]:
        h = activation.rho(affine(h, weight, bias))
        states.append(h)
    return states


def zero_states(chain: Hopfield, problem: Problem) -> States:
    return [torch.zeros_like(state) for state in forward_states(chain, problem)]


def new_value(chain: Hopfield, problem: Problem, states: States, layer: int, lam: complex) -> Tensor:
    """rho(drive + feedback - lambda dL/dx) of one layer, from the states as they are."""
    dtype = states[layer].dtype
    below = problem.x.to(dtype) if layer == 0 else states[layer - 1]
    total = affine(below, chain.weights[layer], chain.biases[layer])
    if layer + 1 < chain.count:
        total = total + chain.gamma * states[layer + 1] @ chain.weights[layer + 1].detach().to(dtype)
    elif lam != 0 and chain.output == "state":
        total = total - lam * pull(problem, states[layer])
    elif lam != 0:
        out = affine(states[layer], chain.weights[-1], chain.biases[-1])
        total = total - lam * pull(problem, out) @ chain.weights[-1].detach().to(dtype)
    return chain.activations[layer].rho(total)


def relax(
    chain: Hopfield,
    problem: Problem,
    states: States,
    lam: complex,
    steps: int,
    order: Order = "odd-even",
    damping: float = 0.0,
    held: Tensor | None = None,
) -> States:
    """`steps` sweeps of the map. Odd-even: layers 1, 3, ... (the first hidden is 1), then 2, 4, ...; each
    group reads the newest states. With `held` the output stays at that value.
    """
    states = list(states)
    if held is not None:
        states[-1] = held
    every = range(chain.count - (held is not None))
    groups = [every] if order == "synchronous" else [every[::2], every[1::2]]
    for _ in range(steps):
        for group in groups:
            moved = {
                layer: (1 - damping) * new_value(chain, problem, states, layer, lam) + damping * states[layer]
                for layer in group
            }
            states = [moved.get(layer, state) for layer, state in enumerate(states)]
    return states


def settle(
    chain: Hopfield,
    problem: Problem,
    lam: complex = 0.0,
    start: States | None = None,
    held: Tensor | None = None,
    tol: float = 3e-16,
) -> States:
    """The fixed point reached from `start` (the feed-forward pass), to round-off."""
    states = forward_states(chain, problem) if start is None else list(start)
    if isinstance(lam, complex):
        states = [state.to(torch.complex128) for state in states]
    for _ in range(400):
        before = states
        states = relax(chain, problem, states, lam, 10, held=held)
        change = max((a - b).abs().max().item() for a, b in zip(states, before, strict=True))
        if change <= tol * max(state.abs().max().item() for state in states):
            return states
    if not change <= 1e-13:  # also where it is no number
        raise ArithmeticError(f"no fixed point: still moving by {change:.1e}")
    return states


# ------------------------------------------------------------------------------------- statistics, contrasts


def hebbian(chain: Hopfield, problem: Problem, states: States, lam: complex = 0.0) -> Gradients:
    """dE/dtheta at fixed states, summed over the batch: -gamma^(l-L) x_l x_{l-1}^T for a layer with a state."""
    found: Gradients = {}
    below = problem.x.to(states[0].dtype)
    for layer, name in enumerate(chain.names):
        if layer < chain.count:
            outer, gain = -states[layer], chain.gamma ** (layer + 1 - chain.count)
        else:
            outer, gain = lam * pull(problem, affine(below, chain.weights[-1], chain.biases[-1])), 1.0
        found[f"{name}.weight"] = gain * outer.T @ below
        found[f"{name}.bias"] = gain * outer.sum(0)
        below = states[layer] if layer < chain.count else below
    return found


def contrast(chain: Hopfield, problem: Problem, second: tuple[float, States], first: tuple[float, States]) -> Gradients:
    """[dE/dtheta(x_2; l_2) - dE/dtheta(x_1; l_1)] / (l_2 - l_1), in the loss's own reduction."""
    (l2, x2), (l1, x1) = second, first
    top, bottom = hebbian(chain, problem, x2, l2), hebbian(chain, problem, x1, l1)
    return {name: (top[name] - bottom[name]) / ((l2 - l1) * problem.scale) for name in top}


def one_sided(chain: Hopfield, problem: Problem, lam: float) -> Gradients:
    free = settle(chain, problem)
    return contrast(chain, problem, (lam, settle(chain, problem, lam, free)), (0.0, free))


def centred(chain: Hopfield, problem: Problem, lam: float) -> Gradients:
    free = settle(chain, problem)
    plus, minus = (settle(chain, problem, s * lam, free) for s in (1, -1))
    return contrast(chain, problem, (lam, plus), (-lam, minus))


def holomorphic(chain: Hopfield, problem: Problem, lam: float, points: int) -> Gradients:
    """(1 / N lambda) sum_k e^(-2 pi i k/N) dE/dtheta at the fixed point under lambda e^(2 pi i k/N), real part."""
    free = settle(chain, problem)
    total: Gradients = {}
    for k in range(points):
        root = complex(math.cos(2 * math.pi * k / points), math.sin(2 * math.pi * k / points))
        statistic = hebbian(chain, problem, settle(chain, problem, lam * root, free), lam * root)
        for name, value in statistic.items():
            total[name] = total.get(name, 0) + value / root / (points * lam)
    return {name: value.real / problem.scale for name, value in total.items()}


def unsubtracted(chain: Hopfield, problem: Problem, lam: float) -> Gradients:
    """The rule that forgets the free phase: dE/dtheta(x_lambda) / lambda."""
    statistic = hebbian(chain, problem, settle(chain, problem, lam), lam)
    return {name: value / (lam * problem.scale) for name, value in statistic.items()}


# ------------------------------------------------------------------- the energy, and what the loss sees of it


def energy(chain: Hopfield, problem: Problem, states: States) -> Tensor:
    """I, summed over the batch, with parameters and states differentiable."""
    total = torch.zeros((), dtype=problem.x.dtype)
    below = problem.x
    for layer, state in enumerate(states):
        drive = below @ chain.weights[layer].T + chain.biases[layer]
        term = chain.activations[layer].potential(state) - (state * drive).sum(-1)
        total = total + chain.gamma ** (layer + 1 - chain.count) * term.sum()
        below = state
    return total


def output_of(chain: Hopfield, states: States) -> Tensor:
    return states[-1] if chain.output == "state" else states[-1] @ chain.weights[-1].T + chain.biases[-1]


def loss(chain: Hopfield, problem: Problem, states: States) -> Tensor:
    """The user's loss, in its own reduction."""
    return problem.loss(output_of(chain, states), problem.y)


def differentiable_step(chain: Hopfield, problem: Problem, states: States) -> States:
    """One free synchronous sweep with parameters and states differentiable."""
    moved, below = [], problem.x
    for layer, state in enumerate(states):
        total = below @ chain.weights[layer].T + chain.biases[layer]
        if layer + 1 < chain.count:
            total = total + chain.gamma * states[layer + 1] @ chain.weights[layer + 1]
        moved.append(chain.activations[layer].rho(total))
        below = state
    return moved


# ------------------------------------------------------------------------------------------------------ nets


def make_hopfield_net(
    sizes: tuple[int, ...] = (4, 6, 5, 3),
    activation: Callable[[], nn.Module] = nn.Tanh,
    *,
    gain: float = 0.8,
    bias: float = 0.0,
    ends_in_activation: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """Weights N(0, gain^2 / fan_in), weak enough for one stable equilibrium; `bias` is added to hidden biases
    (0.5 puts the units of the cut [0, 1] in its middle).
    """
    net = make_net(sizes, activation, ends_in_activation=ends_in_activation, seed=seed)
    linears = [module for module in net if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            linear.weight *= gain
        for linear in linears if ends_in_activation else linears[:-1]:
            linear.bias += bias
    return net
