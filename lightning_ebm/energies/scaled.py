"""An energy whose terms are weighted layer by layer."""

from collections.abc import Mapping

from torch import Tensor

from lightning_ebm.energies.base import (
    Energy,
    LayerView,
    QuadraticEnergy,
    best_response,
    is_divergence,
    is_quadratic,
    precision_of,
)

Factors = Mapping[tuple[str, int], float]
"""Weights by the name of a layer and the call of it."""


class Scaled(Energy):
    """`I = sum_l c_l e(x_l, a_l)`, with c_l > 0.

    Args:
        energy: e.
        factors: c_l.
    """

    def __init__(self, energy: Energy, factors: Factors) -> None:
        self.energy = energy
        self.factors = factors

    @property
    def divergence(self) -> bool:  # type: ignore[override]  # its own, not its class's
        return is_divergence(self.energy)

    def factor(self, layer: LayerView) -> float:
        """c_l."""
        return self.factors[layer.name, layer.call]

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return self.factor(layer) * self.energy.layer_energy(state, layer)

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return best_response(self.energy, pull / self.factor(layer), layer)

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        return self.energy.feasible(state, layer)

    def tangent(self, gradient: Tensor, state: Tensor, layer: LayerView) -> Tensor:
        return self.energy.tangent(gradient, state, layer)


class ScaledQuadratic(Scaled, QuadraticEnergy):
    """The same of 1/2 Pi |x - rho(a)|^2: a precision of c Pi."""

    divergence = True
    layer_energy = QuadraticEnergy.layer_energy
    best_response = QuadraticEnergy.best_response
    feasible = Energy.feasible
    tangent = Energy.tangent

    def layer_precision(self, layer: LayerView) -> float | Tensor:
        return self.factor(layer) * precision_of(self.energy, layer)


def scaled(energy: Energy, factors: Factors) -> Energy:
    """`Scaled`, of its kind."""
    return ScaledQuadratic(energy, factors) if is_quadratic(energy) else Scaled(energy, factors)
