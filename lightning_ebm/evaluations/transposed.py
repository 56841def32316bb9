"""Questions about forces whose Jacobian is the transpose of that of the forces with feedback."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ebm.evaluations.base import Result
from lightning_ebm.evaluations.of_another import OfAnother
from lightning_ebm.evaluations.of_tensors import TensorsEvaluation

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class Transposed(OfAnother[Result]):
    """Another question, about forces in which displacements travel up through B_k and down through the weights W_k.

    Args:
        what: the question. The point is its own, then the operators, then a pull on each layer.
        operators: how many.
    """

    operators: int

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.what.moving(point[: (len(point) - self.operators) // 2])

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Result:
        count = len(network.names)
        own, operators, pulls = point[:count], point[count:-count], point[-count:]
        return self.what.at(network.transposed(operators, pulls), own, strength)


@dataclass(frozen=True)
class PullsToRest(TensorsEvaluation):
    """The pulls under which the transposed network rests where the other one does, and whether it is its transpose.

    The first are `F(x) - F'(x)`, with F and F' the slopes of both; the others `a(x + u) - a(x) - a(u) + a(0)`
    of each layer's drive a, with u = 2 x in another order: 0 to rounding where drives are linear in states, without
    which the Jacobian of one is not the transpose of the other's.

    Args:
        operators: how many. The point is the states, then those.
    """

    operators: int

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return point[: len(point) - self.operators]

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        count = len(network.names)
        states, operators = point[:count], point[count:]
        slopes = [_slopes(one, states) for one in (network.with_feedback(operators), network.transposed(operators))]
        pulls = [crossed - own for own, crossed in zip(*slopes, strict=True)]
        others = [2 * x.flip(-1) for x in states]
        both = [x + u for x, u in zip(states, others, strict=True)]
        drives = [_drives(network, at) for at in (both, states, others, [torch.zeros_like(x) for x in states])]
        bent = [(a - b - c + d).detach() for a, b, c, d in zip(*drives, strict=True)]
        sizes = [a.detach() for a in drives[0]]
        return [*pulls, *bent, *sizes]

    def cost(self, layers: int) -> float:
        return 5.0


def _slopes(network: "Network", states: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        seen = network.at_states(states)
        return network.slopes(seen, network.internal(seen), seen.loss, 0.0, range(len(states)))


def _drives(network: "Network", states: Sequence[Tensor]) -> list[Tensor]:
    return [call.drive for call in network.at_states(states).layers]
