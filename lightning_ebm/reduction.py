"""Whether a loss sums over the batch, read off the graph that it was computed by."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from lightning_ebm.wiring import Region

_SUM = 2
"""torch's number for reduction="sum"."""


def sums_over_batch(loss: Tensor, states: Collection[Tensor], batch_size: int) -> bool:
    """True where between the loss and a sum over the samples of what the states give nothing divides.

    A guess from the names of autograd's nodes: sums, and losses with ``reduction="sum"``, behind signs, additions and
    changes of shape or number format alone. What is divided or multiplied by something after its sum is not found.
    """
    wanted = {id(state) for state in states}
    queue: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_sum(node, batch_size):
            if wanted & Region.below(node).leaves.keys():
                return True
        elif node.name().rstrip("0123456789") in _TRANSPARENT:
            queue.extend(following for following, _ in node.next_functions)
    return False


_TRANSPARENT = {
    f"{name}Backward" for name in ("Add", "Sub", "Neg", "ToCopy", "Clone", "View", "Reshape", "Squeeze", "Unsqueeze")
}


def _is_sum(node: Any, batch_size: int) -> bool:
    if getattr(node, "_saved_reduction", None) == _SUM:
        return True
    return "SumBackward" in node.name() and batch_size in getattr(node, "_saved_self_sym_sizes", ())
