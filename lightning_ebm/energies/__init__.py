"""Internal energies: what a layer pays for holding a state that is not its prediction. One energy a file."""

from lightning_ebm.energies.base import Energy, LayerView
from lightning_ebm.energies.predictive_coding import PredictiveCoding

__all__ = ["Energy", "LayerView", "PredictiveCoding"]
