"""Nudges: at which strengths the loss pulls, and how the phases combine. One nudge a file."""

from lightning_ebm.nudges.base import Nudge, Phase
from lightning_ebm.nudges.centered import Centered
from lightning_ebm.nudges.coupled import Clamped, Coupled
from lightning_ebm.nudges.holomorphic import Holomorphic
from lightning_ebm.nudges.infinitesimal import Infinitesimal
from lightning_ebm.nudges.one_sided import OneSided
from lightning_ebm.nudges.random_sign import RandomSign
from lightning_ebm.nudges.strongest import Strongest

__all__ = [
    "Centered",
    "Clamped",
    "Coupled",
    "Holomorphic",
    "Infinitesimal",
    "Nudge",
    "OneSided",
    "Phase",
    "RandomSign",
    "Strongest",
]
