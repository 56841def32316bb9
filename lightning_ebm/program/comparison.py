"""Whether two records are of the same program."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_ebm.program.record import Mark, Record, Value


class Outline:
    """A record without what its tensors hold: enough to recognize the same program when it comes again.

    Args:
        record: of a pass.
        marks: the calls that carry states.
        loss: what the pass returned.
    """

    def __init__(self, record: Record, marks: Sequence[Mark], loss: Value) -> None:
        self.keys = [mark.key for mark in marks]
        self.roots = _roots(marks, loss)
        self.states = [mark.state for mark in marks]
        self.notes = list(record.notes)
        self.hooked = set(record.hooks)
        self._leaves = {value: weakref.ref(tensor) for value, tensor in record.leaves.items()}

    def repeated_by(self, record: Record, loss: Value) -> "tuple[list[Mark], dict[Value, Value]] | str":
        """The marks of another record that carry states, and its values in place of these; or what is not the same."""
        marks = {mark.key: mark for mark in record.marks}
        if any(key not in marks for key in self.keys):
            return "which modules are called"
        if record.notes != self.notes:
            return "hooks on saved tensors"
        cut = [marks[key] for key in self.keys]
        known = dict(zip(self.states, (mark.state for mark in cut), strict=True))
        found = self._same(_roots(cut, loss), known, record)
        if isinstance(found, str):
            return found
        hooked = {found[value] for value in self.hooked if value in found}
        if hooked != {value for value in record.hooks if value in set(found.values())}:
            return "gradient hooks on tensors"
        return cut, found

    def _same(self, roots: Sequence[Value], known: dict[Value, Value], record: Record) -> dict[Value, Value] | str:
        """Compares what two records did to arrive at some values: the same operations on the same constants.

        Whatever else was done (by metrics and logging, say) may differ.
        """
        here = dict(known)
        taken = set(known.values())
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
            return bool(old == new) or (old != old and new != new)

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
            if not (same(one.args, other.args) and same(tuple(one.kwargs.items()), tuple(other.kwargs.items()))):
                return f"a constant, {one} before and {other} now"
            if len(one.results) != len(other.results):
                return f"the results of {one}"
            for result, again in zip(one.results, other.results, strict=True):
                if result is not None and again is not None:
                    if result.meta != again.meta or here.setdefault(result, again) is not again:
                        return f"which result of {one} it uses"
                    taken.add(again)
        return here

    def _same_leaf(self, old: Value, new: Tensor | None) -> bool:
        before = self._leaves.get(old)
        if before is None or new is None:
            return before is None and new is None
        return before() is new or (old.node is not None and new.requires_grad)


def _roots(marks: Sequence[Mark], loss: Value) -> list[Value]:
    return [*(value for mark in marks for value in (mark.prediction, mark.drive)), loss]
