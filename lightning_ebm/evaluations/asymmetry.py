"""How far forces are from being the slope of an energy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ebm.evaluations.of_tensors import TensorsEvaluation

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class Asymmetry(TensorsEvaluation):
    """`1/2 sum_b s_b^2`, `s = u' (J - J') v`, J the Jacobian of the forces; and its slope in the feedback operators.

    Averaged over independent standard normal u and v it is 1/2 |J - J'|^2 of each sample, 0 where the forces are the
    slope of an energy. J v is measured as the forces' response, [F(x + h v) - F(x - h v)] / 2h: autograd's own second
    derivatives would go through operators where the true ones go through weights.

    Args:
        operators: how many. The point is the states, then u, then v, one tensor a layer each, then the operators; the
            result is the number, and then the slopes.
    """

    operators: int

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return point[: (len(point) - self.operators) // 3]

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        count = len(network.names)
        x, u, v = (point[k * count : (k + 1) * count] for k in range(3))
        operators = [operator.detach().requires_grad_() for operator in point[3 * count :]]
        step = torch.finfo(x[0].dtype).eps ** (1 / 3)
        with torch.enable_grad():
            fed = network.with_feedback(operators)

            def response(to: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
                """to' J along of each sample, a function of the operators."""
                ahead, behind = (
                    _forces(fed, [state + sign * step * d for state, d in zip(x, along, strict=True)], strength)
                    for sign in (1, -1)
                )
                parts = [t * (f - g) for t, f, g in zip(to, ahead, behind, strict=True)]
                sums: Tensor = network.per_sample(parts) / (2 * step)
                return sums

            found = 0.5 * (response(u, v) - response(v, u)).square().sum()
            slopes = torch.autograd.grad(found, operators, allow_unused=True)
        zeros = (torch.zeros_like(o) if s is None else s for s, o in zip(slopes, operators, strict=True))
        return [found.detach(), *zeros]

    def cost(self, layers: int) -> float:
        return 8.0


def _forces(network: "Network", states: Sequence[Tensor], strength: complex) -> list[Tensor]:
    seen = network.at_states(states)
    total = network.internal(seen).sum() + strength * network.loss(seen)
    slopes = torch.autograd.grad(total, seen.states, create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if s is None else s for s, x in zip(slopes, seen.states, strict=True)]
