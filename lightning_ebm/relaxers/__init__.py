"""Relaxers: how states find a point of low or stationary energy. One solver a file; none of them sees a module."""

from lightning_ebm.relaxers.accelerated_fixed_point import AcceleratedFixedPoint
from lightning_ebm.relaxers.anderson import Anderson
from lightning_ebm.relaxers.augmented_lagrangian import AugmentedLagrangian
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.cheapest import Cheapest
from lightning_ebm.relaxers.dyadic import Dyadic
from lightning_ebm.relaxers.error_coordinates import ErrorCoordinates
from lightning_ebm.relaxers.feedback import Feedback
from lightning_ebm.relaxers.feedback_rules import (
    FeedbackRule,
    JacobianHomeostasis,
    KolenPollack,
    Mismatch,
    RandomFeedback,
    SignSymmetry,
)
from lightning_ebm.relaxers.fixed_point import FixedPoint
from lightning_ebm.relaxers.fixed_prediction import FixedPrediction
from lightning_ebm.relaxers.gradient_descent import GradientDescent
from lightning_ebm.relaxers.langevin import Langevin
from lightning_ebm.relaxers.noisy import Noisy
from lightning_ebm.relaxers.quantized import Quantized
from lightning_ebm.relaxers.quasi_newton import QuasiNewton
from lightning_ebm.relaxers.saturated import Saturated
from lightning_ebm.relaxers.scheduled_descent import ScheduledDescent, decaying, spiking
from lightning_ebm.relaxers.state_optimizer import StateOptimizer
from lightning_ebm.relaxers.sweep import Sweep
from lightning_ebm.relaxers.wrapper import Wrapper

__all__ = [
    "AcceleratedFixedPoint",
    "Anderson",
    "AugmentedLagrangian",
    "Cheapest",
    "Dyadic",
    "ErrorCoordinates",
    "Feedback",
    "FeedbackRule",
    "FixedPoint",
    "FixedPrediction",
    "GradientDescent",
    "JacobianHomeostasis",
    "KolenPollack",
    "Langevin",
    "Mismatch",
    "Noisy",
    "Quantized",
    "QuasiNewton",
    "RandomFeedback",
    "Relaxation",
    "Relaxer",
    "Saturated",
    "ScheduledDescent",
    "SignSymmetry",
    "StateOptimizer",
    "Sweep",
    "Wrapper",
    "decaying",
    "spiking",
]
