"""Evaluations: what may be asked of the network at a point. One kind a file, its formula once."""

from lightning_ebm.evaluations.asymmetry import Asymmetry
from lightning_ebm.evaluations.base import Around, Coordinates, Evaluation, Landscape
from lightning_ebm.evaluations.best_responses import BestResponses, ResponseForces, Swept
from lightning_ebm.evaluations.descent_step import DescentStep
from lightning_ebm.evaluations.dyadic_states import DyadicStates, Pairs
from lightning_ebm.evaluations.energy import Energy
from lightning_ebm.evaluations.energy_at_rest import EnergyAtRest
from lightning_ebm.evaluations.error_forces import ErrorForces
from lightning_ebm.evaluations.forces import Forces
from lightning_ebm.evaluations.frozen_forces import FrozenForces
from lightning_ebm.evaluations.held_errors import HeldErrorForces, HeldStates
from lightning_ebm.evaluations.slope import Slope

__all__ = [
    "Around",
    "Asymmetry",
    "BestResponses",
    "Coordinates",
    "DescentStep",
    "DyadicStates",
    "Energy",
    "EnergyAtRest",
    "ErrorForces",
    "Evaluation",
    "Forces",
    "FrozenForces",
    "HeldErrorForces",
    "HeldStates",
    "Landscape",
    "Pairs",
    "ResponseForces",
    "Slope",
    "Swept",
]
