"""Energy-based learning for PyTorch Lightning: relax the states of a network, read a local update off its energy."""

from lightning_ebm import metrics, reference, regime, testing
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.callbacks import GradientAlignment, RelaxationMonitor
from lightning_ebm.energies import Energy, LayerView, PredictiveCoding
from lightning_ebm.errors import (
    ConfigurationError,
    EBMError,
    LayerDiscoveryError,
    RelaxationDivergedError,
    UnsupportedModuleError,
)
from lightning_ebm.learner import Learner
from lightning_ebm.nudges import Centered, Nudge, OneSided, Phase
from lightning_ebm.presets import algorithm, algorithms
from lightning_ebm.relaxers import ErrorCoordinates, GradientDescent, Relaxation, Relaxer, StateOptimizer, Sweep
from lightning_ebm.strategy import EBMStrategy
from lightning_ebm.summary import Summary, summary

__version__ = "0.1.0"

__all__ = [
    "Algorithm", "Centered", "ConfigurationError", "EBMError", "EBMStrategy", "Energy", "ErrorCoordinates",
    "GradientAlignment", "GradientDescent", "LayerDiscoveryError", "LayerView", "Learner", "Nudge", "OneSided",
    "Phase", "PredictiveCoding", "Relaxation", "RelaxationDivergedError", "RelaxationMonitor", "Relaxer",
    "StateOptimizer", "Summary", "Sweep", "UnsupportedModuleError", "algorithm", "algorithms", "metrics", "reference",
    "regime", "summary", "testing",
]  # fmt: skip
