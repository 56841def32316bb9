"""Activations as gradients of convex functions: rho = dG*, rho^-1 = dG. One place for G, G* and the inverse.

For an activation that is the gradient of a convex function, x = rho(a) is the minimum of G(x) - <x, a>, and
G(x) + G*(a) - <x, a> >= 0 is zero exactly there (Fenchel and Young). Energies that need either ask here.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ebm.errors import UnsupportedModuleError

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Conjugate:
    """An activation and the pair of convex functions it belongs to; all keep the shape of their argument.

    Attributes:
        rho: the activation, a -> x; defined for complex a where it is analytic.
        inverse: rho^-1 = G', x -> a; at the ends of a bounded domain one of the drives that lead there.
        potential: G(x), to be summed over units.
        dual: G*(a), to be summed over units; its slope is rho.
        lower: smallest state, -inf if there is none.
        upper: largest state, inf if there is none.
        simplex: dimension along which states are non-negative and sum to 1, as those of a softmax; None is none.
    """

    rho: Elementwise
    inverse: Elementwise
    potential: Elementwise
    dual: Elementwise
    lower: float = -math.inf
    upper: float = math.inf
    simplex: int | None = None

    def feasible(self, state: Tensor) -> Tensor:
        """The nearest state at which G is finite."""
        if state.is_complex():
            return state
        if self.simplex is not None:
            excess = (1 - state.sum(self.simplex, keepdim=True)) / state.shape[self.simplex]
            return (state + excess).clamp_min(torch.finfo(state.dtype).tiny)
        return state if self.lower == -math.inf and self.upper == math.inf else state.clamp(self.lower, self.upper)

    def tangent(self, gradient: Tensor, state: Tensor) -> Tensor:
        """The gradient of `G - <x, .>` without the components that the bounds of the domain hold against."""
        if state.is_complex():
            return gradient
        if self.simplex is not None:
            return gradient - gradient.mean(self.simplex, keepdim=True)
        if self.lower == -math.inf and self.upper == math.inf:
            return gradient
        held = ((state <= self.lower) & (gradient > 0)) | ((state >= self.upper) & (gradient < 0))
        return gradient.masked_fill(held, 0.0)


def conjugate_of(activation: nn.Module | None, name: str) -> Conjugate:
    """G, G* and rho of a layer's activation; None, a whole block, counts as the identity of its output.

    Args:
        activation: the module.
        name: of the layer, for the message.

    Raises:
        UnsupportedModuleError: the activation is not the gradient of a convex function that is known here.
    """
    if activation is None:
        return IDENTITY
    for kind in type(activation).__mro__:
        if (make := CONJUGATES.get(kind)) is not None:
            return make(activation)
    known = ", ".join(sorted(kind.__name__ for kind in CONJUGATES))
    raise UnsupportedModuleError(
        f"Layer {name!r} is a {type(activation).__name__}, for which no convex function G with G' = rho^-1 is known (a"
        " GELU or SiLU has none: it is not monotone). Hopfield and Fenchel-Young energies need one."
        f" Take one of {known}; add yours to lightning_ebm.energies.CONJUGATES; make a whole block the layer,"
        " layers=[...], whose state is then linear; or use ebm.PredictiveCoding(), which takes any activation."
    )


def _half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square()


def _same(x: Tensor) -> Tensor:
    return x


IDENTITY = Conjugate(_same, _same, _half_square, _half_square)


def _must_be_real(a: Tensor) -> None:
    if a.is_complex():
        raise UnsupportedModuleError(
            "An activation with a kink (ReLU, LeakyReLU, Hardtanh, Hardsigmoid) is no analytic function, and a"
            " holomorphic nudge needs states around a circle in the complex plane. Take ebm.Centered(...), the same"
            " with two real points, or tanh, sigmoid and linear maps."
        )


def _box(lower: float, upper: float, slope: float = 1.0, offset: float = 0.0) -> Conjugate:
    """rho(a) = clip(slope a + offset), G = (x^2/2 - offset x) / slope on [lower, upper]."""
    plain = slope == 1 and offset == 0  # as of most; asked here, as an operation that does nothing takes time as well

    def rho(a: Tensor) -> Tensor:
        _must_be_real(a)
        return (a if plain else slope * a + offset).clamp(lower, upper)

    def inverse(x: Tensor) -> Tensor:
        return x if plain else (x - offset) / slope

    def potential(x: Tensor) -> Tensor:
        return 0.5 * x.square() if plain else (0.5 * x.square() - offset * x) / slope

    def dual(a: Tensor) -> Tensor:
        return rho(a) * a - potential(rho(a))

    return Conjugate(rho, inverse, potential, dual, lower, upper)


def _leaky(slope: float) -> Conjugate:
    if slope == 0:
        return _box(0.0, math.inf)
    if slope < 0:
        raise UnsupportedModuleError(
            f"LeakyReLU(negative_slope={slope}) falls and then rises: Hopfield and Fenchel-Young energies need an"
            " activation that grows, the slope of a convex function. Take a slope of 0 or more, or"
            " ebm.PredictiveCoding(), which takes any activation."
        )

    def scaled(x: Tensor, factor: float) -> Tensor:
        _must_be_real(x)
        return F.leaky_relu(x, factor)

    return Conjugate(
        rho=lambda a: scaled(a, slope),
        inverse=lambda x: scaled(x, 1 / slope),
        potential=lambda x: 0.5 * x * scaled(x, 1 / slope),
        dual=lambda a: 0.5 * a * scaled(a, slope),
    )


def _xlogx(x: Tensor) -> Tensor:
    return x * x.log()  # of numbers above 0; torch's xlogy, which knows 0, takes seven times as long


def _inside(x: Tensor, lower: float, upper: float) -> Tensor:
    """Away from where G' is infinite: rounding brings saturated units there."""
    if x.is_complex():
        return x
    eps = torch.finfo(x.dtype).eps
    return x.clamp(lower + eps, upper - eps)


def _log_cosh(a: Tensor) -> Tensor:
    if a.is_complex():
        return a.cosh().log()
    return a.abs() + F.softplus(-2 * a.abs()) - math.log(2)


def _tanh_potential(x: Tensor) -> Tensor:
    x = _inside(x, -1, 1)
    return 0.5 * (_xlogx(1 + x) + _xlogx(1 - x))


def _sigmoid_potential(x: Tensor) -> Tensor:
    x = _inside(x, 0, 1)
    return _xlogx(x) + _xlogx(1 - x)


def _softplus(a: Tensor) -> Tensor:
    return (1 + a.exp()).log() if a.is_complex() else F.softplus(a, threshold=1e9)


TANH = Conjugate(torch.tanh, lambda x: torch.atanh(_inside(x, -1, 1)), _tanh_potential, _log_cosh, -1.0, 1.0)
SIGMOID = Conjugate(torch.sigmoid, lambda x: torch.logit(_inside(x, 0, 1)), _sigmoid_potential, _softplus, 0.0, 1.0)


_SIXTH = _box(0.0, 1.0, slope=1 / 6, offset=0.5)


def _hard_sigmoid(a: Tensor) -> Tensor:
    # One operation instead of three; torch's own has its sixth in float32, and so only seven digits in float64.
    return F.hardsigmoid(a) if a.dtype == torch.float32 else _SIXTH.rho(a)


HARD_SIGMOID = dataclasses.replace(_SIXTH, rho=_hard_sigmoid)


def _softmax(dim: int | None) -> Conjugate:
    axis = -1 if dim is None else dim

    def dual(a: Tensor) -> Tensor:
        # one number for all units of the axis, dealt out evenly so that sums come out right
        return (a.logsumexp(axis, keepdim=True) / a.shape[axis]).expand_as(a)

    return Conjugate(
        rho=lambda a: a.softmax(axis),
        inverse=torch.log,
        potential=lambda x: _xlogx(x if x.is_complex() else x.clamp_min(torch.finfo(x.dtype).tiny)),
        dual=dual,
        simplex=axis,
    )


CONJUGATES: dict[type[nn.Module], Callable[..., Conjugate]] = {
    nn.Identity: lambda module: IDENTITY,
    nn.ReLU: lambda module: _box(0.0, math.inf),
    nn.Hardtanh: lambda module: _box(module.min_val, module.max_val),
    nn.Hardsigmoid: lambda module: HARD_SIGMOID,
    nn.LeakyReLU: lambda module: _leaky(module.negative_slope),
    nn.Tanh: lambda module: TANH,
    nn.Sigmoid: lambda module: SIGMOID,
    nn.Softmax: lambda module: _softmax(module.dim),
}
"""From an activation's class (subclasses count) to what makes its `Conjugate`; add your own here."""
