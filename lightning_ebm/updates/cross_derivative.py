"""The slope of the force in the parameters, along the way that states are displaced."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lightning_ebm.nudges import Phase
from lightning_ebm.updates.base import End, Term, Update
from lightning_ebm.updates.displacement import displacements, terms_along
from lightning_ebm.updates.linear_response import forces_with_graph, linear_response

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


class CrossDerivative(Update):
    """`dL/dtheta + d/dtheta <dI/dx, dx>` at the free equilibrium, with dx the displacement of the states.

    dx is `sum_p weight_p x_p` of the phases, or where the nudge is infinitesimal the linear response -H^-1 dL/dx, with
    H = d2I/dx2. The price is a second derivative of the network: some fused kernels have none.

    Source:
        Almeida 1987; Pineda 1987; Scellier and Bengio 2019.
    """

    name: ClassVar[str] = "cross-derivative"
    second_derivatives: ClassVar[bool] = True
    reads_linear_response: ClassVar[bool] = True

    def hold(self, network: "Network", ends: Sequence[End]) -> Sequence[End]:
        moved = displacements(network, ends) if ends else linear_response(network, network.equilibrium)
        return [End(Phase(1.0, 1.0), network.at_rest(moved))]

    def read(self, network: "Network", ends: Sequence[End]) -> Sequence[Term]:
        return terms_along(network, ends, forces_with_graph)
