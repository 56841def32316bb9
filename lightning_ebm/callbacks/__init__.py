"""Lightning callbacks, one a file."""

from lightning_ebm.callbacks.gradient_alignment import GradientAlignment

__all__ = ["GradientAlignment"]
