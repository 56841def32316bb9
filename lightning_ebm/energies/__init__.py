"""Internal energies: what a layer pays for holding a state that is not its prediction. One energy a file."""

from lightning_ebm.energies.base import Energy, LayerView
from lightning_ebm.energies.bernoulli import Bernoulli
from lightning_ebm.energies.categorical import Categorical
from lightning_ebm.energies.conjugates import CONJUGATES, Conjugate
from lightning_ebm.energies.fenchel_young import FenchelYoung
from lightning_ebm.energies.gaussian import Gaussian
from lightning_ebm.energies.hopfield import Hopfield
from lightning_ebm.energies.huber import Huber
from lightning_ebm.energies.learned_precision import LearnedPrecision
from lightning_ebm.energies.per_layer import PerLayer
from lightning_ebm.energies.poisson import Poisson
from lightning_ebm.energies.predictive_coding import PredictiveCoding

__all__ = [
    "CONJUGATES",
    "Bernoulli",
    "Categorical",
    "Conjugate",
    "Energy",
    "FenchelYoung",
    "Gaussian",
    "Hopfield",
    "Huber",
    "LayerView",
    "LearnedPrecision",
    "PerLayer",
    "Poisson",
    "PredictiveCoding",
]
