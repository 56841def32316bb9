"""Updates of relaxers that leave an error at each layer, to be read instead of the distance to its prediction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Nudge
from lightning_ebm.relaxers import Relaxer
from lightning_ebm.updates.base import End, Term, Update, label

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


class LeftAtLayers(Update):
    """`sum_p weight_p [-<Pi_l d_l, dmu_l/dtheta> + lambda_p dL/dtheta]`, with d_l what the relaxer left at layer l.

    A relaxer that names the update as its own leaves d_l; what others leave is refused.
    """

    def check(self, energy: Energy, nudge: Nudge, relaxer: Relaxer) -> None:
        super().check(energy, nudge, relaxer)
        if not is_divergence(energy):
            raise ConfigurationError(
                f"{type(relaxer).__name__} starts from the forward pass as the free equilibrium, which it is not"
                f" for {type(energy).__name__}. Use ebm.PredictiveCoding() or ebm.FenchelYoung()."
            )

    def fits(self, relaxer: Relaxer) -> bool:
        return relaxer.update is self or label(relaxer.update) == label(self)

    def read(self, network: "Network", ends: Sequence[End]) -> Sequence[Term]:
        return network.terms_of(ends)
