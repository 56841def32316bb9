"""Independent oracles for predictive coding on a chain of (linear map, activation) blocks.

Nothing here knows the library under test. The mathematics is written out with explicit weights and explicit
state tensors:

    E(x, theta) = sum_l 1/2 precision |x_l - mu_l|^2 + lambda * (sum over the samples of their losses)

A layer's state sits "after" its activation, mu_l = rho_l(W_l x_{l-1} + b_l), or "before" it,
mu_l = W_l rho_{l-1}(x_{l-1}) + b_l. The last block is a "readout" (no state: its value enters the loss
directly) or a "state" of its own, nudged by the loss. An update is dE/dtheta / lambda at fixed states, in the
loss's own reduction, so that it tends to the gradient of the user's loss as lambda -> 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

Place = Literal["after", "before"]
Output = Literal["readout", "state"]
Reduction = Literal["mean", "sum"]
Gradients = dict[str, Tensor]


def identity(z: Tensor) -> Tensor:
    return z


@dataclass
class Problem:
    """A batch, the user's loss on it, and how that loss reduces over the batch."""

    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    reduction: Reduction

    @property
    def scale(self) -> int:
        """The factor from the user's loss to the sum over samples."""
        return len(self.x) if self.reduction == "mean" else 1

    def summed_loss(self, output: Tensor) -> Tensor:
        return self.scale * self.loss(output, self.y)

    def rows(self, index: slice | Tensor) -> Problem:
        return Problem(self.x[index], self.y[index], self.loss, self.reduction)


@dataclass
class Chain:
    """A layered network as explicit tensors, with a place for the states."""

    weights: list[Tensor]
    biases: list[Tensor]
    activations: list[Callable[[Tensor], Tensor]]
    names: list[str]
    states_at: Place = "after"
    output: Output = "readout"
    precision: float = 1.0

    @classmethod
    def copy_of(
        cls,
        net: nn.Sequential,
        states_at: Place = "after",
        output: Output = "readout",
        precision: float = 1.0,
    ) -> Chain:
        """The same numbers as `net`, in tensors of our own: training one does not move the other."""
        chain = cls([], [], [], [], states_at, output, precision)
        for index, module in enumerate(net):  # iterating lists a module that is used twice, twice
            if isinstance(module, nn.Linear):
                chain.weights.append(module.weight.detach().clone().requires_grad_())
                chain.biases.append(module.bias.detach().clone().requires_grad_())
                chain.activations.append(identity)
                chain.names.append(str(index))
            else:
                chain.activations[-1] = module
        return chain

    @property
    def parameters(self) -> Gradients:
        pairs = zip(self.names, self.weights, self.biases, strict=True)
        return {f"{n}.{kind}": p for n, w, b in pairs for kind, p in (("weight", w), ("bias", b))}

    def has_state(self, layer: int) -> bool:
        return layer < len(self.weights) - 1 or self.output == "state"

    def run(self, x: Tensor, states: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Each layer's prediction from its parent's state, the states themselves, and what the loss sees.

        Without states every layer takes its own prediction: the feed-forward pass.
        """
        predictions, used, h = [], [], x
        for layer, (weight, bias, rho) in enumerate(zip(self.weights, self.biases, self.activations, strict=True)):
            drive = h @ weight.T + bias
            value = rho(drive) if self.states_at == "after" else drive
            if self.has_state(layer):
                predictions.append(value)
                value = value if states is None else states[layer]
                used.append(value)
            h = value if self.states_at == "after" else rho(value)
        return predictions, used, h

    def forward_states(self, x: Tensor) -> list[Tensor]:
        return [state.detach() for state in self.run(x)[1]]


def energies(chain: Chain, problem: Problem, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(internal energy, summed loss), both summed over the batch."""
    predictions, _, output = chain.run(problem.x, states)
    internal = sum((0.5 * chain.precision * (x - mu).square().sum() for x, mu in zip(states, predictions, strict=True)))
    return torch.as_tensor(internal, dtype=output.dtype), problem.summed_loss(output)


def total_energy(chain: Chain, problem: Problem, states: list[Tensor], lam: float) -> Tensor:
    internal, loss = energies(chain, problem, states)
    return internal + lam * loss


def forces(chain: Chain, problem: Problem, states: list[Tensor], lam: float) -> list[Tensor]:
    """dE/dx of every state, all read at the same point."""
    leaves = [state.detach().requires_grad_() for state in states]
    return list(torch.autograd.grad(total_energy(chain, problem, leaves, lam), leaves))


# --------------------------------------------------------------------------------- (a) relaxing, reading off


def relax_euler(chain: Chain, problem: Problem, lam: float, lr: float, steps: int) -> list[Tensor]:
    """Simultaneous Euler steps x <- x - lr dE/dx from the feed-forward pass."""
    states = chain.forward_states(problem.x)
    for _ in range(steps):
        slopes = forces(chain, problem, states, lam)
        states = [x - lr * slope for x, slope in zip(states, slopes, strict=True)]
    return states


def relax_optimizer(
    chain: Chain,
    problem: Problem,
    lam: float,
    factory: Callable[..., torch.optim.Optimizer],
    steps: int,
    **options: float,
) -> list[Tensor]:
    """The same with a torch optimizer over the states."""
    states = [state.clone().requires_grad_() for state in chain.forward_states(problem.x)]
    optimizer = factory(states, **options)
    for _ in range(steps):
        for state, slope in zip(states, forces(chain, problem, states, lam), strict=True):
            state.grad = slope
        optimizer.step()
    return [state.detach() for state in states]


def relax_errors(chain: Chain, problem: Problem, lam: float, lr: float, steps: int) -> list[Tensor]:
    """x_l = mu_l(x_{l-1}) + e_l and plain descent in e, from e = 0; hands back the states."""
    errors = [torch.zeros_like(state) for state in chain.forward_states(problem.x)]

    def unroll(leaves: list[Tensor]) -> list[Tensor]:
        states: list[Tensor] = []
        for layer, error in enumerate(leaves):
            padded = [*states, *leaves[layer:]]  # the tail is never read: a prediction needs its parent only
            states.append(chain.run(problem.x, padded)[0][layer] + error)
        return states

    for _ in range(steps):
        leaves = [error.detach().requires_grad_() for error in errors]
        energy = total_energy(chain, problem, unroll(leaves), lam)
        slopes = torch.autograd.grad(energy, leaves)
        errors = [error - lr * slope for error, slope in zip(errors, slopes, strict=True)]
    return [state.detach() for state in unroll(errors)]


def update(chain: Chain, problem: Problem, states: list[Tensor], lam: float) -> Gradients:
    """dE/dtheta / lambda with the states held fixed, in the loss's own reduction."""
    energy = total_energy(chain, problem, [state.detach() for state in states], lam)
    names, tensors = zip(*chain.parameters.items(), strict=True)
    slopes = torch.autograd.grad(energy, tensors)
    return {name: slope / (lam * problem.scale) for name, slope in zip(names, slopes, strict=True)}


def centred_update(relax: Callable[[float], list[Tensor]], chain: Chain, problem: Problem, lam: float) -> Gradients:
    """[dE/dtheta at +lambda - dE/dtheta at -lambda] / (2 lambda): the mean of the two one-sided updates."""
    plus, minus = (update(chain, problem, relax(sign * lam), sign * lam) for sign in (1.0, -1.0))
    return {name: 0.5 * (plus[name] + minus[name]) for name in plus}


# --------------------------------------------------------------------------------------- (b) the equilibrium


def curvature(chain: Chain, problem: Problem, states: list[Tensor], lam: float) -> tuple[Tensor, Tensor]:
    """Gradient (B, N) and Hessian (B, N, N) of each sample's energy in its N state coordinates."""
    sizes = [state.shape[1] for state in states]
    flat = torch.cat([state.detach() for state in states], dim=1).requires_grad_()
    energy = total_energy(chain, problem, list(flat.split(sizes, dim=1)), lam)
    (slope,) = torch.autograd.grad(energy, flat, create_graph=True)
    rows = [torch.autograd.grad(slope[:, j].sum(), flat, retain_graph=True)[0] for j in range(flat.shape[1])]
    return slope.detach(), torch.stack(rows, dim=1)


def equilibrium(chain: Chain, problem: Problem, lam: float, tol: float = 1e-12) -> list[Tensor]:
    """The stationary point of E connected to the feed-forward pass: Newton, lambda raised in four stages."""
    states = chain.forward_states(problem.x)
    sizes = [state.shape[1] for state in states]
    residual = torch.tensor(torch.inf)
    for stage in (0.25, 0.5, 0.75, 1.0):
        for _ in range(30):
            slope, hessian = curvature(chain, problem, states, stage * lam)
            residual = slope.abs().max()
            flat = torch.cat(states, dim=1) - torch.linalg.solve(hessian, slope)
            states = list(flat.split(sizes, dim=1))
            if residual < tol:  # the step just taken only improves on it
                break
    if not residual < tol:
        raise ArithmeticError(f"no equilibrium at lambda={lam}: residual {residual:.1e}")
    return states


def loss_curvature_in_errors(chain: Chain, problem: Problem) -> float:
    """Largest eigenvalue of S d2L at the feed-forward pass; times lambda, the theory's small parameter."""
    states = chain.forward_states(problem.x)
    _, free = curvature(chain, problem, states, 0.0)
    _, nudged = curvature(chain, problem, states, 1.0)
    # at the feed-forward pass the internal forces vanish, so the Hessian is affine in lambda
    return torch.linalg.eigvals(torch.linalg.solve(free, nudged - free)).real.max().item()


# -------------------------------------------------------------------------------- (c) backprop, closed forms


def slope_of(rho: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(rho(z).sum(), z)[0]


def backprop(chain: Chain, problem: Problem, activities: list[Tensor] | None = None) -> tuple[Gradients, list[Tensor]]:
    """Backpropagation by hand: (gradients in the loss's reduction, summed-loss delta of each state).

    With `activities` the loss gradient, Jacobians and presynaptic values are taken at them instead of at the
    feed-forward pass: by theory P7 that is predictive coding's update if they are the equilibrium states.
    """
    states = chain.forward_states(problem.x) if activities is None else activities
    _, _, output = chain.run(problem.x, states)
    leaf = output.detach().requires_grad_()
    (delta,) = torch.autograd.grad(problem.summed_loss(leaf), leaf)
    after = chain.states_at == "after"
    parents = [problem.x]
    parents += [x if after else rho(x) for x, rho in zip(states, chain.activations, strict=False)]
    gradients: Gradients = {}
    deltas: list[Tensor] = []
    for layer in reversed(range(len(chain.weights))):
        weight, bias, rho = (
            chain.weights[layer].detach(),
            chain.biases[layer].detach(),
            chain.activations[layer],
        )
        before = chain.states_at == "before" and chain.has_state(layer)
        point = states[layer] if before else parents[layer] @ weight.T + bias
        drive_delta = slope_of(rho, point) * delta
        if chain.has_state(layer):
            deltas.insert(0, drive_delta if before else delta)
        gradients[f"{chain.names[layer]}.weight"] = drive_delta.T @ parents[layer].detach() / problem.scale
        gradients[f"{chain.names[layer]}.bias"] = drive_delta.sum(0) / problem.scale
        delta = drive_delta @ weight
    return gradients, deltas


def linear_equilibrium_update(chain: Chain, problem: Problem, lam: float) -> Gradients:
    """Closed form of a linear chain with the loss 1/2 |o - y|^2 per sample (P8, Q17), without a solver.

    With r = y - (feed-forward output), g = lambda/precision, and S = sum_k J_{L<-k} J_{L<-k}^T over the
    layers k that have a state: output a state:  eps_L = (1/g + S)^-1 r, k <= L, and eps_l = J_{L<-l}^T eps_L;
    output read out: y - o = (1 + g S)^-1 r, k < L, and eps_l = g J_{L<-l}^T (y - o).
    """
    weights, biases = [w.detach() for w in chain.weights], [b.detach() for b in chain.biases]
    width, ratio = weights[-1].shape[0], lam / chain.precision
    eye = torch.eye(width, dtype=weights[0].dtype)
    jacobians = [eye]  # J_{L<-L}, J_{L<-L-1}, ...
    for weight in reversed(weights[1:]):
        jacobians.insert(0, jacobians[0] @ weight)
    forward = problem.x
    for weight, bias in zip(weights, biases, strict=True):
        forward = forward @ weight.T + bias
    r = problem.y - forward
    count = len(weights) if chain.output == "state" else len(weights) - 1
    compliance = sum((j @ j.T for j in jacobians[:count]), torch.zeros_like(eye))
    pull = ratio * torch.linalg.solve(eye + ratio * compliance, r.T).T  # eps_L, or the read-out's counterpart
    gradients: Gradients = {}
    parent = problem.x
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        error = pull @ jacobians[layer]
        local = -(chain.precision / lam) * error / problem.scale
        gradients[f"{chain.names[layer]}.weight"] = local.T @ parent
        gradients[f"{chain.names[layer]}.bias"] = local.sum(0)
        parent = parent @ weight.T + bias + error
    return gradients


# ----------------------------------------------------------------------------------------------- comparisons


def relative_error(estimate: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """|estimate - reference| / |reference| over all parameters, which must carry the same names."""
    assert set(estimate) == set(reference), f"{sorted(estimate)} are not {sorted(reference)}"
    pairs = [(estimate[name].double(), reference[name].double()) for name in reference]
    assert all(a.shape == b.shape for a, b in pairs)
    difference = sum((a - b).square().sum().item() for a, b in pairs)
    return (difference / sum(b.square().sum().item() for _, b in pairs)) ** 0.5


def worst_relative_error(estimate: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest such error of any single parameter: a small layer cannot hide behind a large one."""
    assert set(estimate) == set(reference), f"{sorted(estimate)} are not {sorted(reference)}"
    return max(relative_error({name: estimate[name]}, {name: reference[name]}) for name in reference)


def fitted_slope(lambdas: list[float], errors: list[float]) -> float:
    """Least-squares slope of log error against log lambda."""
    u, v = torch.tensor(lambdas, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    u, v = u - u.mean(), v - v.mean()
    return ((u * v).sum() / u.square().sum()).item()


# -------------------------------------------------------------------------------------- networks and batches


def make_net(
    sizes: tuple[int, ...] = (4, 6, 6, 5, 3),
    activation: Callable[[], nn.Module] | None = nn.Tanh,
    *,
    ends_in_activation: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Linear, activation, ..., Linear with weights N(0, 1/fan_in) and small biases."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64) / fan_in**0.5)
            linear.bias.copy_(0.1 * torch.randn(fan_out, generator=generator, dtype=torch.float64))
        modules.append(linear)
        if activation is not None and (layer < len(sizes) - 2 or ends_in_activation):
            modules.append(activation())
    return nn.Sequential(*modules).to(dtype)


def half_squared_error_sum(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum()


def half_squared_error_mean(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(dim=-1).mean()


LOSSES: dict[str, tuple[Callable[..., Tensor], Reduction]] = {
    "half-mse-sum": (half_squared_error_sum, "sum"),
    "half-mse-mean": (half_squared_error_mean, "mean"),
    "torch-mse-mean": (nn.functional.mse_loss, "mean"),
    "cross-entropy-sum": (nn.CrossEntropyLoss(reduction="sum"), "sum"),
    "cross-entropy-mean": (nn.CrossEntropyLoss(), "mean"),
}


def make_problem(
    loss: str = "half-mse-mean",
    *,
    batch: int = 5,
    inputs: int = 4,
    outputs: int = 3,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, generator=generator, dtype=torch.float64).to(dtype)
    target = 0.5 * torch.randn(batch, outputs, generator=generator, dtype=torch.float64).to(dtype)
    function, reduction = LOSSES[loss]
    y = target.argmax(dim=1) if loss.startswith("cross-entropy") else target
    return Problem(x, y, function, reduction)
