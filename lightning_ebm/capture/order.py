"""Operations in the order in which they need the least memory: each result is used up before the next is begun.

A record has all layers go forward before the first goes back. Nothing but what it reads has to come before an
operation, so the slope of one layer can be finished while its parts are at hand, and in the processor's cache.
"""

from collections.abc import Iterable, Sequence

from lightning_ebm.capture.tape import Value
from lightning_ebm.capture.writing import Op, values_in


def streamed(ops: Sequence[Op], outputs: Iterable[Value]) -> list[Op]:
    """The same operations, those of each output as late as possible before it, outputs in the order given.

    What ends in a few numbers, as the norm of an error does, is done as soon as it can be: whatever it is read off may
    be let go then. What is still to be made of such numbers comes last: it would call for all layers at once.

    Args:
        ops: pure operations, in an order in which they can be carried out.
        outputs: what they are carried out for; operations that none of these needs come last.
    """
    made = {value: op for op in ops for value in op.results if value is not None}
    arguments = {id(op): dict.fromkeys(values_in((op.args, tuple(op.kwargs.values())))) for op in ops}  # in order
    reads = {op: [value for value in values if value in made] for op, values in arguments.items()}
    readers: dict[int, list[Op]] = {}
    for op in ops:
        for value in reads[id(op)]:
            readers.setdefault(id(made[value]), []).append(op)
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
                stack.extend(reversed(before))
                continue
            stack.pop()
            done.add(id(op))
            order.append(op)
            small = [r for r in readers.get(id(op), ()) if id(r) not in done and _is_small(r)]
            stack.extend(r for r in small if all(id(made[value]) in done for value in reads[id(r)]))

    last = [made[value] for value in outputs if value in made]
    largest = max((_size(op) for op in last), default=0)
    for op in [*sorted(last, key=lambda op: 10 * _size(op) <= largest), *ops]:
        carry_out(op)
    return order


def _is_small(op: Op) -> bool:
    """Whether what it gives is a tenth of what it reads, or less."""
    sizes = [value.shape.numel() for value in op.reads() if value.shape is not None]
    return bool(sizes) and _size(op) > 0 and 10 * _size(op) <= max(sizes)


def _size(op: Op) -> int:
    """Elements of what it gives; 0 where that is not known."""
    return sum(value.shape.numel() for value in op.results if value is not None and value.shape is not None)
