"""Energy-based learning for PyTorch Lightning: relax the states of a network, read a local update off its energy."""

from lightning_ebm import evaluations, metrics, reference, regime, testing, updates
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.callbacks import GradientAlignment, RelaxationMonitor
from lightning_ebm.energies import Energy, FenchelYoung, Hopfield, LayerView, LearnedPrecision, PredictiveCoding
from lightning_ebm.equilibrium import Equilibrium
from lightning_ebm.errors import (
    ConfigurationError,
    EBMError,
    LayerDiscoveryError,
    RelaxationDivergedError,
    UnsupportedModuleError,
)
from lightning_ebm.evaluations import BestResponses, ErrorForces, Evaluation, Forces, Landscape
from lightning_ebm.learner import Learner
from lightning_ebm.nudges import (
    Centered,
    Clamped,
    Coupled,
    Holomorphic,
    Infinitesimal,
    Nudge,
    OneSided,
    Phase,
    RandomSign,
    Strongest,
)
from lightning_ebm.presets import algorithm, algorithms
from lightning_ebm.relaxers import (
    AcceleratedFixedPoint,
    Anderson,
    AugmentedLagrangian,
    Cheapest,
    Dyadic,
    ErrorCoordinates,
    FixedPoint,
    FixedPrediction,
    GradientDescent,
    Relaxation,
    Relaxer,
    StateOptimizer,
    Sweep,
)
from lightning_ebm.strategies import EBMDDPStrategy, EBMFSDP2Strategy, EBMStrategy
from lightning_ebm.summary import Summary, summary
from lightning_ebm.updates import Update

__version__ = "0.1.0"

__all__ = [
    "AcceleratedFixedPoint",
    "Algorithm",
    "Anderson",
    "AugmentedLagrangian",
    "BestResponses",
    "Centered",
    "Cheapest",
    "Clamped",
    "ConfigurationError",
    "Coupled",
    "Dyadic",
    "EBMDDPStrategy",
    "EBMError",
    "EBMFSDP2Strategy",
    "EBMStrategy",
    "Energy",
    "Equilibrium",
    "ErrorCoordinates",
    "ErrorForces",
    "Evaluation",
    "FenchelYoung",
    "FixedPoint",
    "FixedPrediction",
    "Forces",
    "GradientAlignment",
    "GradientDescent",
    "Holomorphic",
    "Hopfield",
    "Infinitesimal",
    "Landscape",
    "LayerDiscoveryError",
    "LayerView",
    "LearnedPrecision",
    "Learner",
    "Nudge",
    "OneSided",
    "Phase",
    "PredictiveCoding",
    "RandomSign",
    "Relaxation",
    "RelaxationDivergedError",
    "RelaxationMonitor",
    "Relaxer",
    "StateOptimizer",
    "Strongest",
    "Summary",
    "Sweep",
    "UnsupportedModuleError",
    "Update",
    "algorithm",
    "algorithms",
    "evaluations",
    "metrics",
    "reference",
    "regime",
    "summary",
    "testing",
    "updates",
]  # fmt: skip
