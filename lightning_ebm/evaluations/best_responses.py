"""Where layers go if everything around them stays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_ebm.energies.base import best_response
from lightning_ebm.evaluations.of_slope import SlopeEvaluation
from lightning_ebm.evaluations.of_tensors import TensorsEvaluation
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network
    from lightning_ebm.program.interpreter import Pass


@dataclass(frozen=True)
class BestResponses(TensorsEvaluation):
    """`argmin_x [e_l(x) - <pull_l, x>]` of some layers, and nothing else: no energy, no other layer.

    Args:
        layers: indices of the layers that are asked for.
    """

    layers: tuple[int, ...]

    @property
    def looks(self) -> bool:
        return 0 in self.layers  # where a sweep begins

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        return _responded(network, point, strength, self.layers)[1]

    def cost(self, layers: int) -> float:
        return len(self.layers) / layers

    def with_states(self, found: list[Tensor], put: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        return list(map(put, self.layers, found))


@dataclass(frozen=True)
class Swept(TensorsEvaluation):
    """The states after each group of layers in turn has gone to its best response, in one piece.

    Args:
        groups: indices of the layers that move together.
        damping: how much of the old state stays.
    """

    composed: ClassVar[bool] = True

    groups: tuple[tuple[int, ...], ...]
    damping: float = 0.0

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        states = list(point)
        for layers in self.groups:
            responses = network.evaluate(BestResponses(layers), states, strength)
            states = list(states)  # the network may still look at the list before
            for k, response in zip(layers, responses, strict=True):
                states[k] = response.lerp(states[k], self.damping) if self.damping else response
        return states

    def cost(self, layers: int) -> float:
        return sum(map(len, self.groups)) / layers


@dataclass(frozen=True)
class ResponseForces(SlopeEvaluation):
    """`x_l - argmin_x [e_l(x) - <pull_l, x>]` of all layers, and the energies; its unit step is the best response."""

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Slope:
        seen, responses = _responded(network, point, strength, range(len(point)))
        with torch.no_grad():
            gradients = [x - response for x, response in zip(point, responses, strict=True)]
            return Slope(network.internal(seen), network.loss(seen), gradients)

    def cost(self, layers: int) -> float:
        return 1.5


def _responded(
    network: "Network", point: Sequence[Tensor], strength: complex, layers: Sequence[int]
) -> tuple["Pass", list[Tensor]]:
    with torch.enable_grad():
        seen = network.at_states(point)
        others = network.internal(seen, own=False)
        pulls = network.slopes(seen, others, network.loss(seen), strength, layers, sign=-1.0)
    views = network.views(seen)
    return seen, [best_response(network.energy, pull, views[k]).detach() for k, pull in zip(layers, pulls, strict=True)]
