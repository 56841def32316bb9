"""Whether two records are of the same computation."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_ebm.capture.values import Value


def same_computation(
    expected: Sequence[Value], roots: Sequence[Value], known: Mapping[Value, Value]
) -> dict[Value, Value] | str:
    """Compares what two records did to arrive at some values: the same operations on the same constants.

    Whatever else was done (by metrics and logging, say) may differ.

    Args:
        expected: values of the earlier record.
        roots: values of the new one, in the same order.
        known: inputs of the earlier record, and those of the new one they correspond to.

    Returns:
        The value of the new record for each one of the earlier that led there; or what is not the same.
    """
    here = dict(known)
    taken = set(known.values())
    queue = list(zip(expected, roots, strict=True))

    def same(old: Any, new: Any) -> bool:
        if type(old) is not type(new):
            return False
        if type(old) is Value:
            queue.append((old, new))
            return True
        if type(old) is tuple:
            return len(old) == len(new) and all(map(same, old, new))
        return bool(old == new) or (old != old and new != new)

    while queue:
        old, new = queue.pop()
        if old in here:
            if here[old] is not new:
                return "which tensors it uses"
            continue
        if new in taken:
            return "which tensors it uses"
        one, other = old.node, new.node
        if one is None or other is None:
            if one is not other or old.meta is None or old.meta != new.meta:
                return f"a tensor, {old.meta or old.node} before and {new.meta or new.node} now"
            here[old] = new
            taken.add(new)
            continue
        if one.func is not other.func or one.grad is not other.grad or one.problem != other.problem:
            return f"an operation, {one} before and {other} now"
        if not (same(one.args, other.args) and same(tuple(one.kwargs.items()), tuple(other.kwargs.items()))):
            return f"a constant, {one} before and {other} now"
        for result, again in zip(one.results, other.results, strict=True):
            if result is not None and again is not None:
                here[result] = again
                taken.add(again)
        if here.get(old) is not new:
            return f"which result of {one} it uses"
    return here


def known_by(values: Iterable[Value]) -> set[Value]:
    """Every value that these were computed from, with the other results of those operations."""
    found: set[Value] = set()
    queue = list(values)
    while queue:
        value = queue.pop()
        if value not in found:
            found.add(value)
            if value.node is not None:
                found.update(v for v in value.node.results if v is not None)
                queue.extend(value.node.values())
    return found
