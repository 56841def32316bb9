"""Operations in the order in which they need the least memory: each result is used up before the next is begun.

A record has all layers go forward before the first goes back. Nothing but what it reads has to come before an
operation, so the slope of one layer can be finished while its parts are at hand, and in the processor's cache.

Which layer to begin with is not decided by a rule: what is carried from one to the next, the error below or the pull
from above, and what has to be kept differ from one kind of code to another. All ways are written down, and counted.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from lightning_ebm.capture.reuse import written_by
from lightning_ebm.capture.traits import traits
from lightning_ebm.capture.values import Value, values_in
from lightning_ebm.capture.writing import Op


def orders(ops: Sequence[Op], outputs: Sequence[Value]) -> Iterator[list[Op]]:
    """The ways to stream operations, see `streamed`: from the first layer or the last, large outputs first or last."""
    for backwards, numbers_first in itertools.product((False, True), repeat=2):
        yield streamed(ops, outputs, backwards, numbers_first)


def most_held(ops: Sequence[Op], outputs: Iterable[Value], given: Iterable[Value] = ()) -> int:
    """Elements held at the peak, by results that are still to be read, outputs, and what was given to be let go of.

    Args:
        ops: in the order in which they are carried out.
        outputs: values that must be there at the end.
        given: what is there at the start, and nobody else holds.
    """
    kept = set(outputs)
    last = {value: index for index, op in enumerate(ops) for value in op.reads()}
    held = {value: _elements(value) for value in given}
    now = most = sum(held.values())
    for index, op in enumerate(ops):
        place = written_by(op)
        if place is None and getattr(op.func, "_schema", None) is not None and traits(op.func).shares:
            place = op.args[0] if type(op.args[0]) is Value else None
        for value in op.results:
            if value is not None:
                held[value] = _elements(value) if place is None else held.pop(place, 0)
                now += held[value] if place is None else 0
        most = max(most, now)
        for value in (*op.reads(), *op.results):
            if value in held and value not in kept and last.get(value, index) == index:
                now -= held.pop(value)
    return most


def streamed(
    ops: Sequence[Op], outputs: Iterable[Value], backwards: bool = False, numbers_first: bool = False
) -> list[Op]:
    """The same operations, those of each output as late as possible before it, outputs in the order given.

    What ends in a few numbers, as the norm of an error does, is done as soon as it can be: whatever it is read off may
    be let go then. What is still to be made of such numbers comes last: it would call for all layers at once.

    Args:
        ops: pure operations, in an order in which they can be carried out.
        outputs: what they are carried out for; operations that none of these needs come last.
        backwards: the last of the outputs first, and the last of the layers that a number is made of.
        numbers_first: small outputs first, though what they are made of be of all layers.
    """
    made = {value: op for op in ops for value in op.results if value is not None}
    arguments = {id(op): dict.fromkeys(values_in((op.args, tuple(op.kwargs.values())))) for op in ops}  # in order
    reads = {op: [value for value in values if value in made] for op, values in arguments.items()}
    readers: dict[int, list[Op]] = {}
    for op in ops:
        for value in reads[id(op)]:
            readers.setdefault(id(made[value]), []).append(op)
    last = [made[value] for value in outputs if value in made][:: -1 if backwards else 1]
    largest = max((_size(op) for op in last), default=0)
    done: set[int] = set()
    order: list[Op] = []

    def carry_out(op: Op) -> None:
        stack = [op]
        while stack:
            op = stack[-1]
            if id(op) in done:
                stack.pop()
                continue
            before = [made[value] for value in reads[id(op)] if id(made[value]) not in done]
            if before:
                of_numbers = all(10 * _elements(value) <= largest for value in reads[id(op)])
                stack.extend(before if backwards and of_numbers else reversed(before))
                continue
            stack.pop()
            done.add(id(op))
            order.append(op)
            small = [r for r in readers.get(id(op), ()) if id(r) not in done and _is_small(r)]
            stack.extend(r for r in small if all(id(made[value]) in done for value in reads[id(r)]))

    for op in [*sorted(last, key=lambda op: (10 * _size(op) <= largest) is not numbers_first), *ops]:
        carry_out(op)
    return order


def _is_small(op: Op) -> bool:
    """Whether what it gives is a tenth of what it reads, or less."""
    largest = max(map(_elements, op.reads()), default=0)
    return 0 < 10 * _size(op) <= largest


def _size(op: Op) -> int:
    """Elements of what it gives; 0 where that is not known."""
    return sum(_elements(value) for value in op.results if value is not None)


def _elements(value: Value) -> int:
    """Of a value; 0 where that is not known."""
    return 0 if value.shape is None else value.shape.numel()
