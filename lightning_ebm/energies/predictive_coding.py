"""The squared prediction error of predictive coding."""

import math
from dataclasses import dataclass

from lightning_ebm.energies.base import LayerView, QuadraticEnergy
from lightning_ebm.errors import ConfigurationError


@dataclass(frozen=True)
class PredictiveCoding(QuadraticEnergy):
    """I = sum_l 1/2 Pi |x_l - rho(a_l)|^2, per sample.

    Its free equilibrium is the forward pass. As the nudge goes to 0 the update is backprop's whatever the precision:
    Pi_l (x_l - rho(a_l)) -> -lambda delta_l, so compare Pi * error with delta, never the bare error.

    Args:
        precision: Pi > 0, the inverse variance of every layer.

    Raises:
        ConfigurationError: the precision is not a positive finite number.

    Source:
        Rao and Ballard 1999; Whittington and Bogacz 2017; Millidge et al. 2023 (arXiv 2206.02629).
    """

    precision: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.precision) and self.precision > 0):
            raise ConfigurationError(
                f"PredictiveCoding(precision={self.precision!r}): a precision is an inverse variance and must be a"
                " positive finite number; with any other the energy has no minimum. Try precision=1.0."
            )

    def layer_precision(self, layer: LayerView) -> float:
        return self.precision
