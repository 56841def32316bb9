"""Nudges: at which strengths the loss pulls, and how the phases combine. One nudge a file."""

from lightning_ebm.nudges.base import Nudge, Phase
from lightning_ebm.nudges.centered import Centered
from lightning_ebm.nudges.one_sided import OneSided

__all__ = ["Centered", "Nudge", "OneSided", "Phase"]
