"""The Fenchel-Young gap of lifted networks."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_ebm.energies.base import Energy, LayerView
from lightning_ebm.energies.conjugates import conjugate_of


@dataclass(frozen=True)
class FenchelYoung(Energy):
    """`I = sum_l [G(x_l) + G*(a_l) - <x_l, a_l>] >= 0`, zero exactly at x_l = rho(a_l), per sample.

    A divergence: its free equilibrium is the forward pass, one phase is enough, and as the nudge goes to 0 the update
    is backprop's. It is convex in x_l and in a_l, and its slope in the drive is rho(a_l) - x_l: the update never
    contains rho', so a unit that the forward pass saturates or switches off can still be pulled back.

    Raises:
        UnsupportedModuleError: (in use) an activation without a convex G, such as GELU.

    Source:
        Blondel et al. 2020 for the gap; Li et al. 2019 and Wang and Benning 2023 (lifted networks) for the energy.
    """

    divergence: ClassVar[bool] = True

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        pair = conjugate_of(layer.activation, layer.name)
        return pair.potential(state) + pair.dual(layer.drive) - state * layer.drive

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return conjugate_of(layer.activation, layer.name).rho(layer.drive + pull)

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        return conjugate_of(layer.activation, layer.name).feasible(state)

    def tangent(self, gradient: Tensor, state: Tensor, layer: LayerView) -> Tensor:
        return conjugate_of(layer.activation, layer.name).tangent(gradient, state)
