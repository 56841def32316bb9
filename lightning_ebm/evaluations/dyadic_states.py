"""Pairs of states around their means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_ebm.energies.base import best_response
from lightning_ebm.evaluations.base import Evaluation
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


class Pairs(NamedTuple):
    """z^+ and z^- of each layer, and how far their mean is from the one they were found around.

    Attributes:
        ahead: z_l^+.
        behind: z_l^-.
        slope: mean - (z^+ + z^-) / 2, and the energies at the mean where they were asked for.
    """

    ahead: list[Tensor]
    behind: list[Tensor]
    slope: Slope


@dataclass(frozen=True)
class DyadicStates(Evaluation[Pairs]):
    """Pairs of states around a mean that answer half the pull from above, and half its opposite, top down.

    `z_l^+- = argmin_x [e_l(x, a_l) -+ <pull_l, x> / 2]`, `pull_l = -d/dx_l [sum_k e_k(z_k^+) - e_k(z_k^-) + lambda L]`,
    with every drive and Jacobian taken at the mean.

    Args:
        energies: whether those at the mean are wanted. Pairs do not need them, and logarithms in them cost a third.
    """

    energies: bool = False

    @property
    def watched(self) -> "DyadicStates":
        return DyadicStates(energies=True)

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Pairs:
        with torch.enable_grad():
            seen = network.at_states(point)
        energy, views = network.energy, network.views(seen)
        ahead, behind = list(point), list(point)

        def sent(k: int, slope: Tensor) -> Tensor:
            ahead[k] = best_response(energy, -0.5 * slope, views[k]).detach()
            behind[k] = best_response(energy, 0.5 * slope, views[k]).detach()
            ends = (energy.layer_energy(x, views[k]).sum() for x in (ahead[k], behind[k]))
            return next(ends) - next(ends)

        with torch.enable_grad():
            network.signals(seen, strength * network.loss(seen), sent)
        gradients = [m - 0.5 * (p + q) for m, p, q in zip(point, ahead, behind, strict=True)]
        internal = network.internal(seen).detach() if self.energies else ()
        return Pairs(ahead, behind, Slope(internal, network.loss(seen).detach(), gradients))

    def cost(self, layers: int) -> float:
        return 1.0

    def flat(self, found: Pairs) -> list[Tensor]:
        slope = found.slope
        return [*slope.parts, slope.loss, *slope.gradients, *found.ahead, *found.behind]

    def built(self, tensors: list[Tensor], layers: int) -> Pairs:
        *internal, loss = tensors[: 1 + self.energies]
        rest = tensors[1 + self.energies :]
        gradients, ahead, behind = (rest[k : k + layers] for k in range(0, 3 * layers, layers))
        return Pairs(ahead, behind, Slope(internal, loss, gradients))

    def slope(self, found: Pairs) -> Slope:
        return found.slope

    def with_slope(self, found: Pairs, change: Callable[[Slope], Slope]) -> Pairs:
        return found._replace(slope=change(found.slope))
