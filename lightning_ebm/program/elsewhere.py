"""What cannot be computed where states are not those of the user's own pass."""

import torch

from lightning_ebm.errors import UnsupportedModuleError


class ElsewhereError(UnsupportedModuleError, RuntimeError):
    """An operation of a step that cannot be computed with states in place."""


def elsewhere(error: Exception, what: str) -> Exception:
    """For what torch raises where states are not those of the pass; no more memory is what it was.

    Args:
        error: by torch.
        what: was computed, and where.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return error
    return ElsewhereError(
        f"The step cannot be computed at other states than those of its own pass ({what}): {error}. Indices, counts and"
        " shapes that follow from states may be others there, beside masks and sizes that stay those of the pass. Take"
        " them off what is detached, or within torch.no_grad(): then they belong to the pass as well."
    )
