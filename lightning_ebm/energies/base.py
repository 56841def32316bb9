"""The one method an internal energy consists of."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerView:
    """What an energy may know of a layer in one pass. Shapes: ``B`` samples first, the rest as the layer has it.

    Attributes:
        name: qualified name of the module, ``"net.1"``.
        call: which call of that module within the pass, from 0.
        drive: a_l, what arrived at the layer, ``(B, ...)``; a function of the parents' states and of the parameters.
        prediction: mu_l = rho(a_l), what the layer would emit in a plain forward pass; the shape of the state.
        activation: the module rho itself, or None where the layer is a whole block (then drive is prediction).
    """

    name: str
    call: int
    drive: Tensor
    prediction: Tensor
    activation: nn.Module | None


class Energy(ABC):
    """Internal energy I(x, theta) = sum_l sum_b e(x_l, a_l, rho_l).

    A subclass writes ``layer_energy``. Everything else (which layers, which parents, batching, gradients) is the
    network's affair, so an energy never sees a module it would have to call.
    """

    divergence: ClassVar[bool] = False
    """True promises e >= 0, and e = 0 with zero gradient exactly at x = rho(a): then the free equilibrium is the
    feed-forward pass, costs nothing, and contributes nothing to the update (theory: dI/dtheta vanishes there)."""

    @abstractmethod
    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        """e(x_l, a_l, rho_l), batch first. Any trailing shape: it is summed over all but the batch dimension."""


class QuadraticEnergy(Energy):
    """A divergence e = 1/2 Pi_l |x_l - rho(a_l)|^2, which can be written in the errors e_l = x_l - rho(a_l).

    In these coordinates nothing is ever subtracted, so a nudge of 1e-5 costs no digits in float32; relaxers that work
    on errors (`ErrorCoordinates`, `Sweep`) ask for this class.
    """

    divergence: ClassVar[bool] = True

    @abstractmethod
    def layer_precision(self, layer: LayerView) -> float:
        """Pi_l > 0."""

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return 0.5 * self.layer_precision(layer) * (state - layer.prediction).square()
