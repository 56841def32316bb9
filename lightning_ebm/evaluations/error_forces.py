"""Energies and their slope in the errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ebm.evaluations.base import Which
from lightning_ebm.evaluations.held_errors import HeldErrorForces
from lightning_ebm.evaluations.of_slope import SlopeEvaluation, holomorphic, is_one
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class ErrorForces(SlopeEvaluation):
    """`e_l + 1/Pi_l lambda dL/de_l` at x_l = rho(a_l) + e_l, and the energies, as functions of the errors e.

    That is dE/de in the metric of the precision; its unit step is the fixed-point map e <- -lambda/Pi dL/de.
    """

    coordinates = "errors"

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Slope:
        with torch.enable_grad():
            seen = network.at_errors(point)
            loss = network.loss(seen)
            signals = network.signals(seen, loss)
        precisions = network.precisions(seen)
        at_rest = all(error is none for error, none in zip(point, network.no_errors, strict=True))
        for k, (e, p) in enumerate(zip(point, precisions, strict=True)):  # one layer at a time: nothing is held twice
            if isinstance(strength, complex) or strength != 1:
                signals[k] = strength * holomorphic(signals[k])
            pull = signals[k] if is_one(p) else signals[k] / p
            signals[k] = pull if at_rest else e + pull
        if at_rest:
            return Slope(network.no_errors[0].new_zeros(network.batch_size), loss.detach(), signals)
        if isinstance(strength, complex):  # then e is, and its energy is to be analytic
            internal = network.per_sample(0.5 * p * e.square() for p, e in zip(precisions, point, strict=True))
        else:
            internal = network.quadratic(point, precisions)
        return Slope(internal, loss.detach(), signals)

    def where_held(self, held: Which) -> HeldErrorForces:
        return HeldErrorForces(held)

    def cost(self, layers: int) -> float:
        return 1.0
