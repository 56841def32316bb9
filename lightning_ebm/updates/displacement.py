"""What each layer's own energy says of its parameters, along the way that states are displaced."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_ebm.nudges import Phase
from lightning_ebm.updates.base import End, Term, Update, label

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network
    from lightning_ebm.program.interpreter import Pass
    from lightning_ebm.relaxers import Relaxer

    Forces = Callable[[Network, Pass], list[Tensor]]


class Displacement(Update):
    """`dL/dtheta + sum_l <d/dtheta de_l/dx_l, dx_l>` at the free equilibrium; of Hopfield `-<dx_l, da_l/dtheta>`.

    dx is `sum_p weight_p x_p`: by how much the receiving unit is displaced, times what the sending one does at rest. A
    weight's part in feedback is none of it, as feedback goes through synapses of its own. Where displacements are
    `-J'^-1 dL/dx`, with J the Jacobian of the forces, this is the gradient of the loss at the free equilibrium;
    `ebm.Feedback(..., corrected=True)` makes them so.

    The trap: a weight that does carry feedback, as its transpose, has another half of the gradient there, which
    "contrast" counts and this does not.

    Source:
        Scellier et al. 2018 (arXiv 1808.04873) for the rule; Scurria et al. 2026 (arXiv 2602.03670, its abstract).
    """

    name: ClassVar[str] = "displacement"

    def fits(self, relaxer: "Relaxer") -> bool:
        return label(relaxer.update) == self.name

    def hold(self, network: "Network", ends: Sequence[End]) -> Sequence[End]:
        return [End(Phase(1.0, 1.0), network.at_rest(displacements(network, ends)))]

    def read(self, network: "Network", ends: Sequence[End]) -> Sequence[Term]:
        return terms_along(network, ends, _own_forces)


def displacements(network: "Network", ends: Sequence[End]) -> list[Tensor]:
    """`sum_p weight_p (x_p - x)` of all layers, with x the free equilibrium."""
    start = network.equilibrium
    moved = [torch.zeros_like(x) for x in start]
    for end in ends:
        if end.strength:
            states = zip(moved, network.held(end.found).point, start, strict=True)
            moved = [m + _real(end.weight * (x - x0)) for m, x, x0 in states]
    return moved


def terms_along(network: "Network", ends: Sequence[End], forces: "Forces") -> list[Term]:
    """`dL/dtheta + d/dtheta <forces, dx>` where dx is left at the layers."""
    terms: list[Term] = []
    for end in ends:
        seen, moved = network.at(end.found), end.found.local_error
        assert moved is not None
        terms += network.loss_terms(seen, 1.0)
        terms += map(Term, forces(network, seen), moved)
    return terms


def _own_forces(network: "Network", seen: "Pass") -> list[Tensor]:
    """de_l/dx_l of each layer, a function of its drive."""
    with torch.enable_grad():
        views = zip(network.views(seen), seen.states, strict=True)
        own = [(network.energy.layer_energy(x, view).sum(), x) for view, x in views]
        return [torch.autograd.grad(energy, x, create_graph=True)[0] for energy, x in own]


def _real(tensor: Tensor) -> Tensor:
    return tensor.real if tensor.is_complex() else tensor
