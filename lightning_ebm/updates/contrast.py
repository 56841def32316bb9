"""The contrast of phases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lightning_ebm.nudges import Phase
from lightning_ebm.updates.base import End, Term, Update

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


class Contrast(Update):
    """`sum_p weight_p dE/dtheta(x_p)`, every state held fixed.

    With weights that sum to 0 and `weight_p strength_p` that sum to 1 this is a slope in the nudge, which is the
    gradient of the loss at the free equilibrium as the nudge goes to 0. Where the output is held, the loss is no part
    of E; what it says of parameters directly, such as a penalty on weights, is added at the free equilibrium.

    Source:
        Scellier and Bengio 2017.
    """

    name: ClassVar[str] = "contrast"
    needs_forward_pass: ClassVar[bool] = False
    reads_held_output: ClassVar[bool] = True

    def hold(self, network: "Network", ends: Sequence[End]) -> Sequence[End]:
        share = sum(end.phase.weight.real * end.phase.strength.real for end in ends if end.phase.held)
        if not share or not network.loss_parameters:
            return ends
        return [*ends, End(Phase(share, 1.0), network.at_rest(), internal=False)]

    def read(self, network: "Network", ends: Sequence[End]) -> Sequence[Term]:
        return network.terms_of(ends)
