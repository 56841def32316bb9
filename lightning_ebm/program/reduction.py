"""How a loss reduces over the batch, read from the record of the pass that computed it."""

from collections.abc import Sequence
from typing import Any

from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.named import named
from lightning_ebm.program.operations import is_operator
from lightning_ebm.program.record import Node, Value, depending

_MEAN, SUM = 1, 2
"""torch's numbers for reduction="mean" and "sum"."""
TRANSPARENT = {
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


def averaged_elements(program: Program) -> int | None:
    """Number of elements that the loss is a mean over: 784 B for a mean over images of 784 pixels, B for a mean of B.

    Means over parts of the dimensions multiply; sums count once; factors before the mean are left alone, and targets
    that a cross-entropy ignores are counted. None where that cannot be told: a sum that something divides, terms that
    are means over different numbers, other reductions.
    """
    moving = depending({mark.state for mark in program.marks}, program.order)
    counts: set[int | None] = set()
    queue: list[tuple[Value | None, int | None, bool]] = [(program.loss, None, False)]
    while queue:
        value, count, divided = queue.pop()
        node = None if value is None else value.node
        if value not in moving or node is None:
            continue
        behind = [read for read in node.values() if read in moving]
        name, reduced = name_of(node), _averaged_by(node, behind)
        if name in ("mul", "div") and len(behind) == 1:
            queue.append((behind[0], count, divided or name == "div"))
        elif reduced is not None or name in TRANSPARENT:
            if divided and (name == "sum" or reduction_of(node) == SUM):
                return None
            so_far = count if reduced is None else (count or 1) * reduced
            ends = reduced is not None and name not in ("mean", "sum")
            counts |= {so_far} if ends else set()
            queue.extend([] if ends else [(read, so_far, divided) for read in behind])
        else:
            counts.add(count)
    return counts.pop() if len(counts) == 1 else None


def _averaged_by(node: Node, behind: Sequence[Value]) -> int | None:
    """How many elements each of its results is a mean over, 1 for sums; None where it does not reduce."""
    name, reduction, result = name_of(node), reduction_of(node), node.results[0] if node.results else None
    if reduction in (_MEAN, SUM) and behind:
        # A likelihood of classes has one element a target.
        targets = [value for value in node.values() if not value.is_continuous] if name.startswith("nll_loss") else []
        return 1 if reduction == SUM else (targets or behind)[0].shape.numel()
    if name in ("mean", "sum") and behind and result is not None:
        return 1 if name == "sum" else behind[0].shape.numel() // max(1, result.shape.numel())
    return None


def reduction_of(node: Node) -> int | None:
    """Its argument of that name, if it has one."""
    if not is_operator(node.func):
        return None
    for position, argument in enumerate(node.func._schema.arguments):
        if argument.name == "reduction":
            given = node.args[position] if position < len(node.args) else argument.default_value
            found: Any = node.kwargs.get("reduction", given)
            return None if found is None else int(found)
    return None


def name_of(node: Node) -> str:
    """Of its operation, or its function."""
    func = node.func
    return func.overloadpacket.__name__ if is_operator(func) else named(func).name
