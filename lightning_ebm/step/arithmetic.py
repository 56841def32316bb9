"""What passes of a step need beyond the user's code."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.complex_ops import ComplexOperations

_MISSING = re.compile(r"derivative for (\S+) is not implemented")
"""How torch says so."""


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

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within it, an operation without a second derivative is refused by its name."""
        try:
            yield
        except RuntimeError as error:
            if not self._second_derivatives or (found := _MISSING.search(str(error))) is None:
                raise
            raise UnsupportedModuleError(
                f"The step uses an operation that torch cannot differentiate twice ({found[1]}), and this algorithm"
                " reads the update off second derivatives. Write it in others, such as nn.Hardtanh(0, 1) in place of"
                ' nn.Hardsigmoid, or take a finite nudge: "equilibrium-propagation" in place of "infinitesimal".'
            ) from error

    def __call__(self) -> AbstractContextManager[Any]:
        """All that a pass with states in place needs."""
        stack = ExitStack()
        stack.enter_context(self.derivatives())
        if self.is_complex:
            stack.enter_context(ComplexOperations())
        return stack
