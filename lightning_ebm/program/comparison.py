"""Whether two records are of the same program."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_ebm.program.numbers import OtherNumbers, Site, as_input, may_differ
from lightning_ebm.program.record import Mark, Node, Record, Value
from lightning_ebm.program.trail import Trail, same_constant


class Outline:
    """A record without what its tensors hold: enough to recognize the same program when it comes again.

    Args:
        record: of a pass.
        marks: the calls that carry states.
        loss: what the pass returned.
        module: the user's.
    """

    def __init__(self, record: Record, marks: Sequence[Mark], loss: Value, module: nn.Module) -> None:
        self.keys = [mark.key for mark in marks]
        self.kinds = [type(mark.module) for mark in marks]
        self.roots = _roots(marks, loss)
        self.states = [mark.state for mark in marks]
        self.notes = list(record.notes)
        self.hooked = set(record.hooks)
        self.trail = Trail(record, module)
        self._marks = list(marks)
        self._loss = loss
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
        found = _Comparison(self.trail, record, known).of(self.roots, _roots(cut, loss))
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


class _Comparison:
    """What two records did to arrive at some values: the same operations on the same constants, or what is not.

    Whatever else was done (by metrics and logging, say) may differ.

    Args:
        trail: of the first one.
        record: the second.
        known: values of the first, and those of the second in their place.
    """

    def __init__(self, trail: Trail, record: Record, known: dict[Value, Value]) -> None:
        self._trail, self._record = trail, record
        self._here, self._taken = dict(known), set(known.values())
        self._queue: list[tuple[Value, Value]] = []
        self._numbers: list[tuple[Any, Site]] = []

    def of(self, old: Sequence[Value], new: Sequence[Value]) -> dict[Value, Value] | str:
        """The values of the second in place of the first's, from these on backwards; or what is not the same."""
        self._queue.extend(zip(old, new, strict=True))
        while self._queue:
            differs = self._differs(*self._queue.pop())
            if differs is not None:
                return differs
        if any(type(number) is not Value for number, _ in self._numbers):
            return OtherNumbers([site for _, site in self._numbers])
        self._here.update({number: as_input(site, self._record) for number, site in self._numbers})
        return self._here

    def _differs(self, old: Value, new: Value) -> str | None:
        """What is not the same about two values; None where they are, as far as what they are computed from is."""
        if old in self._here:
            return None if self._here[old] is new else "which tensors it uses"
        if new in self._taken:
            return "which tensors it uses"
        if old.meta != new.meta:
            return f"shapes, strides or kinds of numbers, {old.meta} before and {new.meta} now"
        if not self._same_leaf(old, self._record.leaves.get(new)):
            return "which parameters it uses"
        self._here[old] = new
        self._taken.add(new)
        one, other = old.node, new.node
        if one is None or other is None:
            return None if one is other else "which tensors are computed"
        if one.func is not other.func and one.func != other.func:
            return f"an operation, {one} before and {other} now"
        if not self._same_arguments(one, other):
            return f"a constant, {one} before and {other} now"
        return self._other_results(one, other)

    def _other_results(self, one: Node, other: Node) -> str | None:
        if len(one.results) != len(other.results):
            return f"the results of {one}"
        for result, again in zip(one.results, other.results, strict=True):
            if result is not None and again is not None:
                if result.meta != again.meta or self._here.setdefault(result, again) is not again:
                    return f"which result of {one} it uses"
                self._taken.add(again)
        return None

    def _same_arguments(self, one: Node, other: Node) -> bool:
        if len(one.args) != len(other.args):
            return False
        for position, (old, new) in enumerate(zip(one.args, other.args, strict=True)):
            if not self._same(old, new):
                if not may_differ(other, position, old, new):
                    return False
                self._numbers.append((old, Site(other, position)))
        return self._same(tuple(one.kwargs.items()), tuple(other.kwargs.items()))

    def _same(self, old: Any, new: Any) -> bool:
        if type(old) is not type(new):
            return False
        if type(old) is Value:
            self._queue.append((old, new))
            return True
        if type(old) is tuple:
            return len(old) == len(new) and all(map(self._same, old, new))
        return old is new if isinstance(old, Tensor) else same_constant(old, new)

    def _same_leaf(self, old: Value, new: Tensor | None) -> bool:
        if old not in self._trail.leaves or new is None:
            return old not in self._trail.leaves and new is None
        return self._trail.takes(old, new)


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
