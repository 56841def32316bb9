"""An energy without the terms of some layers: nothing but the rest says where their states should be."""

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm.energies.base import Energy, LayerView, QuadraticEnergy, is_divergence, is_quadratic, precision_of
from lightning_ebm.errors import ConfigurationError


class WithoutTerms(Energy):
    """`I - sum_{l in names} e(x_l, a_l)`: a flat prior for inputs, which then are all the others' to place.

    Args:
        energy: a divergence, whose other terms alone still have a lower bound.
        names: of the states, as in `ebm.summary`.

    Raises:
        ConfigurationError: the energy is no divergence, and unbounded without the terms.
    """

    divergence: ClassVar[bool] = True

    def __init__(self, energy: Energy, names: Collection[str]) -> None:
        if not is_divergence(energy):
            raise ConfigurationError(
                f"free={list(names)}: without a term of its own a layer has no lowest state under {energy!r}, whose"
                " other terms are linear in it. Hold it by clamp={...}, or take ebm.PredictiveCoding()."
            )
        self.energy = energy
        self.names = tuple(names)

    def __repr__(self) -> str:
        return f"{self.energy!r} without {', '.join(self.names)}"

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return torch.zeros_like(state) if layer.state_name in self.names else self.energy.layer_energy(state, layer)

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        return self.energy.feasible(state, layer)

    def tangent(self, gradient: Tensor, state: Tensor, layer: LayerView) -> Tensor:
        return self.energy.tangent(gradient, state, layer)


class QuadraticWithoutTerms(WithoutTerms, QuadraticEnergy):
    """The same of 1/2 Pi |x - rho(a)|^2: a precision of 0."""

    layer_energy = QuadraticEnergy.layer_energy
    best_response = Energy.best_response  # where nothing pulls back there is none

    def layer_precision(self, layer: LayerView) -> float | Tensor:
        return 0.0 if layer.state_name in self.names else precision_of(self.energy, layer)


def without_terms(energy: Energy, names: Collection[str]) -> Energy:
    """`WithoutTerms`, of its kind; the energy itself without names."""
    if not names:
        return energy
    return QuadraticWithoutTerms(energy, names) if is_quadratic(energy) else WithoutTerms(energy, names)
