"""The slope in the errors while predictions stay at the forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ebm.evaluations.of_slope import SlopeEvaluation
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class FrozenForces(SlopeEvaluation):
    """`e_l + 1/Pi_l (lambda dL/dx_l - sum_k J_k' Pi_k e_k)`, all slopes and Jacobians taken at the forward pass."""

    coordinates = "errors"

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Slope:
        seen = network.first
        with torch.enable_grad():
            precisions = network.precisions(seen)
            loss = network.loss(seen)
            terms = zip(precisions, point, seen.layers, strict=True)
            sent = [-(p * e * call.prediction).sum() for p, e, call in terms]
            slopes = network.slopes(seen, torch.stack(sent), loss, strength, range(len(point)))
        internal = network.per_sample([0.5 * p * e.square() for p, e in zip(precisions, point, strict=True)])
        gradients = [e + s / p for e, s, p in zip(point, slopes, precisions, strict=True)]
        return Slope(internal, loss.detach(), gradients)

    def cost(self, layers: int) -> float:
        return 1.0
