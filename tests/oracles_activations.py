"""Activations by their two potentials: G with G' = rho^-1, and its convex conjugate G* with G*' = rho.

Written down from the definitions, with names of our own for every function, so that nothing is shared with a
library's table. A potential is summed over the last axis of features: values of shape (B, D) give (B,).
G is +infinity outside the range of rho. Constants are fixed by G(x) + G*(a) - <x, a> = 0 at x = rho(a).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def xlogx(x: Tensor) -> Tensor:
    return torch.special.xlogy(x, x)


def inside(x: Tensor, low: float, high: float, value: Tensor) -> Tensor:
    return torch.where((x < low) | (x > high), torch.inf, value).sum(-1)


def log_cosh(a: Tensor) -> Tensor:
    return a.abs() + torch.log1p(torch.exp(-2 * a.abs())) - torch.log(torch.tensor(2.0, dtype=a.dtype))


@dataclass(frozen=True)
class Activation:
    """rho (also of complex numbers where it is holomorphic), G and G*."""

    rho: Callable[[Tensor], Tensor]
    potential: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]

    def gap(self, x: Tensor, a: Tensor) -> Tensor:
        """G(x) + G*(a) - <x, a> per sample: zero at x = rho(a), positive elsewhere (Fenchel-Young)."""
        return self.potential(x) + self.conjugate(a) - (x * a).sum(-1)


IDENTITY = Activation(lambda a: a, lambda x: 0.5 * x.square().sum(-1), lambda a: 0.5 * a.square().sum(-1))
TANH = Activation(
    torch.tanh,
    lambda x: (x * torch.atanh(x) + 0.5 * torch.log1p(-x * x)).sum(-1),
    lambda a: log_cosh(a).sum(-1),
)
SIGMOID = Activation(
    lambda a: 1 / (1 + torch.exp(-a)),
    lambda x: (xlogx(x) + xlogx(1 - x)).sum(-1),
    lambda a: torch.logaddexp(a, torch.zeros_like(a)).sum(-1),
)
RELU = Activation(
    lambda a: torch.where(a > 0, a, 0.0),
    lambda x: inside(x, 0.0, torch.inf, 0.5 * x * x),
    lambda a: 0.5 * torch.where(a > 0, a, 0.0).square().sum(-1),
)
# the hard sigmoid of the equilibrium-propagation literature: rho(a) = a cut to [0, 1]
UNIT_CLAMP = Activation(
    lambda a: torch.clamp(a, 0.0, 1.0),
    lambda x: inside(x, 0.0, 1.0, 0.5 * x * x),
    lambda a: torch.where(a < 0, 0.0, torch.where(a > 1, a - 0.5, 0.5 * a * a)).sum(-1),
)
SYMMETRIC_CLAMP = Activation(
    lambda a: torch.clamp(a, -1.0, 1.0),
    lambda x: inside(x, -1.0, 1.0, 0.5 * x * x),
    lambda a: torch.where(a.abs() > 1, a.abs() - 0.5, 0.5 * a * a).sum(-1),
)
# torch's: rho(a) = a/6 + 1/2 cut to [0, 1]
HARD_SIGMOID = Activation(
    lambda a: torch.clamp(a / 6 + 0.5, 0.0, 1.0),
    lambda x: inside(x, 0.0, 1.0, 3 * x * x - 3 * x),
    lambda a: torch.where(a < -3, 0.0, torch.where(a > 3, a, (a + 3).square() / 12)).sum(-1),
)
SOFTMAX = Activation(
    lambda a: torch.exp(a - a.real.amax(-1, keepdim=True)) / torch.exp(a - a.real.amax(-1, keepdim=True)).sum(-1, True),
    lambda x: torch.where((x.sum(-1) - 1).abs() < 1e-9, inside(x, 0.0, 1.0, xlogx(x)), torch.inf),
    lambda a: torch.logsumexp(a, -1),
)

ALL: dict[str, tuple[Callable[[], nn.Module], Activation]] = {
    "identity": (nn.Identity, IDENTITY),
    "tanh": (nn.Tanh, TANH),
    "sigmoid": (nn.Sigmoid, SIGMOID),
    "relu": (nn.ReLU, RELU),
    "hardtanh(0, 1)": (lambda: nn.Hardtanh(0.0, 1.0), UNIT_CLAMP),
    "hardtanh(-1, 1)": (nn.Hardtanh, SYMMETRIC_CLAMP),
    "hardsigmoid": (nn.Hardsigmoid, HARD_SIGMOID),
    "softmax": (lambda: nn.Softmax(dim=-1), SOFTMAX),
}


def activation_of(module: nn.Module) -> Activation:
    """The entry for a module of the user's network."""
    if isinstance(module, nn.Hardtanh):
        return {(0.0, 1.0): UNIT_CLAMP, (-1.0, 1.0): SYMMETRIC_CLAMP}[module.min_val, module.max_val]
    table = {
        nn.Identity: IDENTITY,
        nn.Tanh: TANH,
        nn.Sigmoid: SIGMOID,
        nn.ReLU: RELU,
        nn.Hardsigmoid: HARD_SIGMOID,
        nn.Softmax: SOFTMAX,
    }
    return table[type(module)]
