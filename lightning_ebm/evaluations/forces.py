"""Energies and their slope in the states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ebm.energies.base import is_bounded, is_quadratic
from lightning_ebm.evaluations.of_slope import SlopeEvaluation, is_one, ones_for
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network
    from lightning_ebm.program.interpreter import Pass


@dataclass(frozen=True)
class Forces(SlopeEvaluation):
    """`dE/dx_l`, with E = sum_b I_b + lambda L, and the energies."""

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Slope:
        with torch.enable_grad():
            seen = network.at_states(point)
            if is_quadratic(network.energy) and not isinstance(strength, complex):
                return _of_quadratic(network, seen, strength)
            internal, loss = network.internal(seen), network.loss(seen)
            gradients = network.slopes(seen, internal, loss, strength, range(len(network.names)))
        if is_bounded(network.energy):
            found = zip(gradients, point, network.views(seen), strict=True)
            gradients = [network.energy.tangent(gradient, state, view) for gradient, state, view in found]
        return Slope(internal.detach(), loss.detach(), gradients)

    def cost(self, layers: int) -> float:
        return 1.5


def _of_quadratic(network: "Network", seen: "Pass", strength: float) -> Slope:
    """dE/dx_l = Pi_l e_l - sum_k (d mu_k / dx_l)' Pi_k e_k + strength * dL/dx_l, and nothing more."""
    with torch.no_grad():
        errors = [call.state - call.prediction for call in seen.layers]
        precisions = network.precisions(seen)
        pulls = [e if is_one(p) else p * e for e, p in zip(errors, precisions, strict=True)]
    unit = network.unit_of(strength)
    seeds = pulls if unit == 1 else [pull / unit for pull in pulls]
    tops = [(call.prediction, seed) for call, seed in zip(seen.layers, seeds, strict=True)]
    if strength:
        tops.append((seen.loss, -network.loss_scale * strength / unit * ones_for(seen.loss)))
    downhill = list(network.pulled_back(seen, [(top, seed) for top, seed in tops if top.requires_grad]))
    with torch.no_grad():
        internal = network.quadratic(errors, precisions)
        del tops, seeds, errors  # as large as the states, each
        for k, (pull, down) in enumerate(zip(pulls, downhill, strict=True)):
            pulls[k] = pull if down is None else torch.sub(pull, down, alpha=unit)
            downhill[k] = None
            del pull, down
    return Slope(internal, network.loss(seen).detach(), pulls)
