"""Errors of the units that are free, where others are held."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ebm.evaluations.base import Which
from lightning_ebm.evaluations.of_slope import SlopeEvaluation
from lightning_ebm.evaluations.of_tensors import TensorsEvaluation
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network
    from lightning_ebm.program.record import StateKey


@dataclass(frozen=True)
class HeldErrorForces(SlopeEvaluation):
    """`dE/de` where a free unit is x = mu + e and a held one x = v, in the metric of the precision; and the energies.

    The error v - mu of a held unit is a function of the errors below, so that E(e) = sum_l 1/2 Pi_l |x_l - mu_l|^2 +
    lambda L is the same energy, with the same equilibria, in the errors of the free units alone. A layer without
    precision moves in the metric of its states.

    Args:
        held: which layers. The point is the errors of all layers, then v of each of these, and its mask if it has one.
    """

    held: Which
    coordinates = "errors"

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Slope:
        count = len(network.names)
        with torch.enable_grad():
            leaves = [error.detach().requires_grad_() for error in point[:count]]
            seen = network.with_states(displaced(network, self.held, [*leaves, *point[count:]]))
            internal, loss = network.internal(seen), network.loss(seen)
            total = internal.sum() + strength * loss if strength else internal.sum()
            slopes = torch.autograd.grad(total, leaves, allow_unused=True)
        gradients = [
            torch.zeros_like(error) if slope is None else slope / p
            for error, slope, p in zip(leaves, slopes, network.metric_precisions(seen), strict=True)
        ]
        return Slope(internal.detach(), loss.detach(), gradients)

    def cost(self, layers: int) -> float:
        return 1.0


@dataclass(frozen=True)
class HeldStates(TensorsEvaluation):
    """The states at such errors.

    Args:
        held: as in `HeldErrorForces`.
    """

    held: Which
    coordinates = "errors"

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        with torch.no_grad():
            seen = network.with_states(displaced(network, self.held, point))
        return [state.detach() for state in seen.states]

    def cost(self, layers: int) -> float:
        return 0.5


def displaced(
    network: "Network", held: Which, point: Sequence[Tensor]
) -> "Callable[[StateKey, Tensor], Tensor | None]":
    """x = mu + e of free units and x = v of held ones, in one graph from the errors to the loss."""
    rest = list(point[len(network.names) :])
    values = {k: (rest.pop(0), rest.pop(0) if masked else None) for k, masked in held}
    index = {key: k for k, key in enumerate(network.keys)}

    def state_of(key: "StateKey", prediction: Tensor) -> Tensor | None:
        k = index[key]
        value, units = values.get(k, (None, None))
        if value is not None and units is None:
            return value
        free = prediction + point[k]
        return free if value is None or units is None else torch.where(units, value, free)

    return state_of
