"""Lightning callbacks, one a file."""

from lightning_ebm.callbacks.gradient_alignment import GradientAlignment
from lightning_ebm.callbacks.relaxation_monitor import RelaxationMonitor

__all__ = ["GradientAlignment", "RelaxationMonitor"]
