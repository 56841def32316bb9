"""Operations that torch cannot differentiate twice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_ebm.errors import UnsupportedModuleError

_MISSING = re.compile(r"derivative for '?(\w\S*?)'? is not implemented")
"""How torch says so."""


@contextmanager
def twice_differentiable(what: str) -> Iterator[None]:
    """Within it, an operation without a second derivative is refused by its name.

    Args:
        what: is made of second derivatives, and what to do without.
    """
    try:
        yield
    except RuntimeError as error:
        if (found := _MISSING.search(str(error))) is None:
            raise
        raise UnsupportedModuleError(
            f"The step uses an operation that torch cannot differentiate twice ({found[1]}), and {what}, or write it in"
            " others, such as nn.Hardtanh(0, 1) in place of nn.Hardsigmoid, and attention within"
            " torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        ) from error
