"""The layered Hopfield energy of equilibrium propagation and contrastive Hebbian learning."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies.base import Energy, LayerView
from lightning_ebm.energies.conjugates import conjugate_of


@dataclass(frozen=True)
class Hopfield(Energy):
    """`I = sum_l gamma^(l-L) [G(x_l) - <x_l, a_l>]`, with G' = rho^-1, per sample.

    Its equilibria are x_l = rho(a_l + gamma W_{l+1}' x_{l+1}): what stands above pulls on what lies below, also in the
    free phase, so the free equilibrium is not the forward pass and has to be found. For drives that are not linear,
    W' is the transposed Jacobian. The factor gamma^(l-L) is what makes the dynamics with feedback scaled by gamma
    descend an energy; it is also the factor by which Xie and Seung scale their Hebbian contrast, so that the contrast
    of dI/dtheta is theirs without further ado.

    Args:
        feedback: gamma > 0. 1 is the ordinary energy; as gamma -> 0 the free phase becomes the forward pass, and a
            fully clamped phase gives backprop's gradient + O(gamma).

    Raises:
        ConfigurationError: the gain is not a positive finite number.
        UnsupportedModuleError: (in use) an activation without a convex G, such as GELU.

    Source:
        Hopfield 1984; Scellier and Bengio 2017, layered as in Scellier et al. 2023; Xie and Seung 2003 for gamma.
    """

    rests_at_prediction: ClassVar[bool] = True

    feedback: float = 1.0

    def __post_init__(self) -> None:
        wanted = (
            "a positive finite gain; at 0 nothing would come back from above, and layers below the last would learn"
            " nothing. Take 1.0, or 0.05 for weak feedback"
        )
        checked.keep(self, feedback=checked.number(self, "feedback", self.feedback, wanted, above=0))

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        potential = conjugate_of(layer.activation, layer.name).potential(state)
        return self._share(layer) * (potential - state * layer.drive)

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return conjugate_of(layer.activation, layer.name).rho(layer.drive + pull / self._share(layer))

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        return conjugate_of(layer.activation, layer.name).feasible(state)

    def tangent(self, gradient: Tensor, state: Tensor, layer: LayerView) -> Tensor:
        return conjugate_of(layer.activation, layer.name).tangent(gradient, state)

    def _share(self, layer: LayerView) -> float:
        return float(self.feedback**-layer.above)
