"""What ranks do together within a step: constants of its record, or refused, as passes are each rank's own."""

from typing import Any

import torch
from torch import distributed

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.dispatch import DispatchMode

NAMESPACES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
_READING = frozenset({"send", "barrier", "monitored_barrier_", "check_for_nan"})


def writes_first(func: torch._ops.OpOverload) -> bool:
    """Whether it is one of torch.distributed's that write to their first argument, which their schemas do not tell."""
    return func.namespace == "c10d" and func._schema.name.split("::")[1] not in _READING


def collective(name: str) -> UnsupportedModuleError:
    """For a step that differentiates through a collective."""
    return UnsupportedModuleError(
        f"The step differentiates through a collective ({name}): it would have to run at every state of a relaxation,"
        " and every rank takes as many as its own batch needs, so that ranks would wait for each other for ever. Gather"
        " what is a constant (torch.no_grad, or all_gather without sync_grads), or compute the loss locally."
    )


def refuse(func: Any, within: str) -> None:
    """Raises where code of the user's own that runs at every state of a relaxation waits for other ranks.

    Args:
        func: an operation of that code.
        within: how the code is called.
    """
    if func.namespace in NAMESPACES and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise collective(f"{func.name()} in {within}")


class Refusing(DispatchMode):
    """Within it collectives are refused, see `refuse`."""

    def __init__(self, within: str) -> None:
        super().__init__()
        self._within = within

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse(func, self._within)
        return func(*args, **(kwargs or {}))
