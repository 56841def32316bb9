"""Following a known record: from the second step on nothing is built, as long as the same operations come again."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.program.record import Mark, Node, Record, StateKey, Value, meta_of, outside_meta_of, stands_for

Read = Callable[[Tensor], Value | None]
"""What a tensor holds, as far as this pass has seen it."""
Take = Callable[[Tensor, Value], object]
"""Notes that a tensor from outside holds a value."""


class Trail:
    """What a pass did, in order, without what its tensors held.

    Args:
        record: of the pass.
    """

    def __init__(self, record: Record) -> None:
        self.nodes = list(record.nodes)
        self.marks = {mark.state.node: mark for mark in record.marks}
        self.leaves = {value: weakref.ref(tensor) for value, tensor in record.leaves.items()}


class Follower:
    """Compares a pass with a known one, operation by operation, and hands out the nodes of that one.

    What it has handed out is equal in operations, constants, shapes, strides, kinds of numbers, devices, parameters and
    in what is computed from what. Where a pass does something else it is told None once, and follows no more: it goes
    on from the nodes that it was given.

    Args:
        trail: of the known pass.
        read: see `Read`.
        take: see `Take`.
        take_number: notes which number an input is.
    """

    def __init__(self, trail: Trail, read: Read, take: Take, take_number: Callable[[Value, complex], None]) -> None:
        self._nodes = trail.nodes
        self._trail = trail
        self._at = 0
        self._read = read
        self._take = take
        self._take_number = take_number
        self._taken: set[Value] = set()

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Node | None:
        """The node of an operation that is about to run."""
        if self._at == len(self._nodes):
            return None
        node = self._nodes[self._at]
        if node.func is not func or len(args) != len(node.args) or len(kwargs) != len(node.kwargs):
            return None
        for arg, known in zip(args, node.args, strict=True):
            if not self._same(arg, known):
                return None
        for name, arg in kwargs.items():
            if name not in node.kwargs or not self._same(arg, node.kwargs[name]):
                return None
        self._at += 1
        return node

    def mark(
        self, key: StateKey, module: Any, drive: Value | None, prediction: Value, rounding: float, weighted: bool
    ) -> Mark | None:
        """The mark of a call that has returned."""
        node = self._nodes[self._at] if self._at < len(self._nodes) else None
        if node is None or node.func is not stands_for or node.args[0] is not prediction or node.args[1] != key:
            return None
        mark = self._trail.marks[node]
        was = mark.module, mark.drive, mark.rounding, mark.weighted
        if was != (module, drive or prediction, rounding, weighted):
            return None
        self._at += 1
        return mark

    def _same(self, arg: Any, known: Any) -> bool:
        if isinstance(arg, Tensor):
            if type(known) is not Value:
                return False
            value = self._read(arg)
            if value is known:
                return True
            return value is None and known.node is None and known not in self._taken and self._is_again(arg, known)
        if isinstance(arg, list | tuple):
            return type(known) is tuple and len(arg) == len(known) and all(map(self._same, arg, known))
        if isinstance(arg, torch.Generator):
            return known is None
        if type(known) is Value and known.number is not None:
            if not isinstance(arg, int | float) or type(arg) is not known.number:
                return False
            self._take_number(known, arg)
            return True
        return same_constant(arg, known)

    def _is_again(self, tensor: Tensor, known: Value) -> bool:
        """Whether a tensor that this pass has not seen yet may be what the known pass read from outside."""
        leaf = self._trail.leaves.get(known)
        if known.meta != outside_meta_of(tensor) or (leaf is not None and leaf() is not tensor):
            return False
        self._taken.add(known)
        self._take(tensor, known)
        return True


def same_constant(one: Any, other: Any) -> bool:
    """Whether two numbers, or what else operations are given besides tensors, are the same to the bit."""
    if type(one) is not type(other):
        return False
    if one == other:
        return one != 0 or type(one) is not float or math.copysign(1.0, one) == math.copysign(1.0, other)
    return bool(one != one and other != other)


def same_results(node: Node, results: Sequence[Any]) -> bool:
    """Whether an operation has given tensors of the kinds that it gave before."""
    if len(results) != len(node.results):
        return False
    return all(
        (value is None and not isinstance(result, Tensor))
        or (value is not None and isinstance(result, Tensor) and value.meta == meta_of(result))
        for value, result in zip(node.results, results, strict=True)
    )
