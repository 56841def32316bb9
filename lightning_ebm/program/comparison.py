"""Whether two records are of the same program."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_ebm.program.following import Trail, same_constant
from lightning_ebm.program.numbers import OtherNumbers, Site, as_input, may_differ
from lightning_ebm.program.record import Mark, Node, Record, Value


class Outline:
    """A record without what its tensors hold: enough to recognize the same program when it comes again.

    Args:
        record: of a pass.
        marks: the calls that carry states.
        loss: what the pass returned.
    """

    def __init__(self, record: Record, marks: Sequence[Mark], loss: Value) -> None:
        self.keys = [mark.key for mark in marks]
        self.kinds = [type(mark.module) for mark in marks]
        self.roots = _roots(marks, loss)
        self.states = [mark.state for mark in marks]
        self.notes = list(record.notes)
        self.hooked = set(record.hooks)
        self.trail = Trail(record)
        self._marks = list(marks)
        self._loss = loss
        self._leaves = self.trail.leaves
        self._values = _reached(self.roots)
        self._made = {value for value in record.leaves if value.node is not None} & self._values

    def repeated_by(self, record: Record, loss: Value) -> "tuple[list[Mark], dict[Value, Value] | None] | str":
        """The marks of another record that carry states, and its values in place of these; or what is not the same.

        None in place of values says that they are these.
        """
        if loss is self._loss:  # all that it was computed from has been followed
            return (self._marks, None) if self._also_same(record) else "what else than operations it is made of"
        marks = {mark.key: mark for mark in record.marks}
        if any(key not in marks for key in self.keys):
            return "which modules are called"
        if record.notes != self.notes:
            return "hooks on saved tensors"
        cut = [marks[key] for key in self.keys]
        if [type(mark.module) for mark in cut] != self.kinds:  # which energies may look at
            return "which kinds of modules are called"
        known = dict(zip(self.states, (mark.state for mark in cut), strict=True))
        found = self._same(_roots(cut, loss), known, record)
        if isinstance(found, str):
            return found
        hooked = {found[value] for value in self.hooked if value in found}
        if hooked != {value for value in record.hooks if value in set(found.values())}:
            return "gradient hooks on tensors"
        return cut, found

    def _also_same(self, record: Record) -> bool:
        """Of a record that has been followed to the loss, whatever else makes a program."""
        here = set(record.marks)
        made = {value for value in record.leaves if value.node is not None}
        hooked = record.hooks.keys() & self._values
        return (
            all(mark in here for mark in self._marks)
            and record.notes == self.notes
            and hooked == self.hooked & self._values
            and made & self._values == self._made
        )

    def _same(self, roots: Sequence[Value], known: dict[Value, Value], record: Record) -> dict[Value, Value] | str:
        """Compares what two records did to arrive at some values: the same operations on the same constants.

        Whatever else was done (by metrics and logging, say) may differ.
        """
        here = dict(known)
        taken = set(known.values())
        numbers: list[tuple[Any, Site]] = []
        queue = list(zip(self.roots, roots, strict=True))

        def same(old: Any, new: Any) -> bool:
            if type(old) is not type(new):
                return False
            if type(old) is Value:
                queue.append((old, new))
                return True
            if type(old) is tuple:
                return len(old) == len(new) and all(map(same, old, new))
            if isinstance(old, Tensor):
                return old is new
            return same_constant(old, new)

        def same_arguments(one: Node, other: Node) -> bool:
            if len(one.args) != len(other.args):
                return False
            for position, (old, new) in enumerate(zip(one.args, other.args, strict=True)):
                if not same(old, new):
                    if not may_differ(other, position, old, new):
                        return False
                    numbers.append((old, Site(other, position)))
            return same(tuple(one.kwargs.items()), tuple(other.kwargs.items()))

        while queue:
            old, new = queue.pop()
            if old in here:
                if here[old] is not new:
                    return "which tensors it uses"
                continue
            if new in taken:
                return "which tensors it uses"
            if old.meta != new.meta:
                return f"shapes, strides or kinds of numbers, {old.meta} before and {new.meta} now"
            if not self._same_leaf(old, record.leaves.get(new)):
                return "which parameters it uses"
            one, other = old.node, new.node
            here[old] = new
            taken.add(new)
            if one is None or other is None:
                if one is not other:
                    return "which tensors are computed"
                continue
            if one.func is not other.func and one.func != other.func:
                return f"an operation, {one} before and {other} now"
            if not same_arguments(one, other):
                return f"a constant, {one} before and {other} now"
            if len(one.results) != len(other.results):
                return f"the results of {one}"
            for result, again in zip(one.results, other.results, strict=True):
                if result is not None and again is not None:
                    if result.meta != again.meta or here.setdefault(result, again) is not again:
                        return f"which result of {one} it uses"
                    taken.add(again)
        if any(type(old) is not Value for old, _ in numbers):
            return OtherNumbers([site for _, site in numbers])
        here.update({old: as_input(site, record) for old, site in numbers})
        return here

    def _same_leaf(self, old: Value, new: Tensor | None) -> bool:
        before = self._leaves.get(old)
        if before is None or new is None:
            return before is None and new is None
        return before() is new or (old.node is not None and new.requires_grad)


def _roots(marks: Sequence[Mark], loss: Value) -> list[Value]:
    return [*(value for mark in marks for value in (mark.prediction, mark.drive)), loss]


def _reached(roots: Sequence[Value]) -> set[Value]:
    """All that these were computed from, and they."""
    found: set[Value] = set()
    queue = list(roots)
    while queue:
        value = queue.pop()
        if value not in found:
            found.add(value)
            if value.node is not None:
                queue.extend(value.node.values())
    return found
