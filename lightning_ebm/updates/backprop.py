"""The control of every experiment."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lightning_ebm.energies import Energy
from lightning_ebm.nudges import Nudge, Phase
from lightning_ebm.relaxers import Relaxer
from lightning_ebm.updates.base import End, Term, Update

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


class Backprop(Update):
    """dL/dtheta: the loss passes through unchanged, and autograd differentiates it as without this library.

    The other parts of the algorithm are not used.
    """

    name: ClassVar[str] = "backprop"
    relaxes: ClassVar[bool] = False

    def check(self, energy: Energy, nudge: Nudge, relaxer: Relaxer) -> None:
        """All parts fit, as none is used."""

    def phases(self, nudge: Nudge) -> tuple[Phase, ...]:
        return ()

    def read(self, network: "Network", ends: Sequence[End]) -> Sequence[Term]:
        seen = network.at_states(network.free)
        return network.loss_terms(seen, 1.0)
