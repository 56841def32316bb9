"""How a loss reduces over the batch, read from the record of the pass that computed it."""

from typing import Any

import torch

from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.record import Node, Value, depending

_SUM = 2
"""torch's number for reduction="sum"."""
_TRANSPARENT = {
    "add",
    "sub",
    "neg",
    "_to_copy",
    "clone",
    "view",
    "reshape",
    "squeeze",
    "unsqueeze",
    "stands_for",
    "stack",
    "sum",
}


def sums_over_batch(program: Program, batch_size: int) -> bool:
    """True where between the loss and a sum over the samples of what the states give nothing divides.

    Sums, and losses with ``reduction="sum"``, behind signs, additions and changes of shape or number format alone. What
    is divided or multiplied by something after its sum is not found.
    """
    moving = depending({mark.state for mark in program.marks}, program.order)
    queue, seen = [program.loss], set[Value]()
    while queue:
        value = queue.pop()
        if value is None or value in seen or value not in moving or value.node is None:
            continue
        seen.add(value)
        if _is_sum(value.node, batch_size):
            return True
        if _name(value.node) in _TRANSPARENT:
            queue.extend(value.node.values())
    return False


def reduced_sizes(program: Program) -> frozenset[int]:
    """First dimensions of the tensors that the loss reduces to single numbers: samples are among them."""
    queue, seen, found = [program.loss], set[Value](), set[int]()
    while queue:
        value = queue.pop()
        if value is None or value in seen or not value.is_continuous:
            continue
        seen.add(value)
        if value.shape.numel() > 1:
            found.add(value.shape[0])
        elif value.node is not None:
            queue.extend(value.node.values())
    return frozenset(found)


def _name(node: Node) -> str:
    func = node.func
    return func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else getattr(func, "__name__", "")


def _is_sum(node: Node, batch_size: int) -> bool:
    if not isinstance(node.func, torch._ops.OpOverload):
        return False
    given = {argument.name: arg for argument, arg in zip(node.func._schema.arguments, node.args, strict=False)}
    if "reduction" in given or "reduction" in node.kwargs:
        reduction: Any = given.get("reduction", node.kwargs.get("reduction"))
        return reduction == _SUM and any(batch_size in value.shape for value in node.values())
    first = next(node.values(), None)
    result = node.results[0]
    summed = _name(node) == "sum" and first is not None and result is not None
    return summed and batch_size in first.shape and batch_size not in result.shape  # type: ignore[union-attr]
