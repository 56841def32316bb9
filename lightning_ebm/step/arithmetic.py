"""What passes of a step need beyond the user's code."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ebm.network.second_derivatives import twice_differentiable
from lightning_ebm.program.complex_ops import ComplexOperations


class Arithmetic:
    """Complex numbers, second derivatives, or neither.

    Args:
        second_derivatives: whether slopes are differentiated again.

    Attributes:
        is_complex: whether states are complex.
    """

    def __init__(self, second_derivatives: bool) -> None:
        self._second_derivatives = second_derivatives
        self.is_complex = False

    def derivatives(self) -> AbstractContextManager[Any]:
        """Attention in single operations where slopes are differentiated again: fused kernels have no second ones."""
        return sdpa_kernel(SDPBackend.MATH) if self._second_derivatives else nullcontext()

    def explained(self) -> AbstractContextManager[None]:
        """Within it, an operation without a second derivative is refused by its name."""
        what = (
            "this algorithm reads the update off second derivatives. Take a finite nudge, such as"
            ' "equilibrium-propagation" in place of "infinitesimal"'
        )
        return twice_differentiable(what) if self._second_derivatives else nullcontext()

    def __call__(self) -> AbstractContextManager[Any]:
        """All that a pass with states in place needs."""
        stack = ExitStack()
        stack.enter_context(self.derivatives())
        if self.is_complex:
            stack.enter_context(ComplexOperations())
        return stack
