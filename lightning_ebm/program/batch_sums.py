"""Whether a loss sums over the samples of a batch, or is scaled, read from the record of the pass that computed it."""

from collections import defaultdict
from collections.abc import Iterator, Set

import torch
from torch import Tensor

from lightning_ebm.program.held import Held, ordered
from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.operations import is_operator
from lightning_ebm.program.record import Node, Value, depending
from lightning_ebm.program.reduction import SUM, TRANSPARENT, name_of, reduction_of

_MOST = 1.5
"""Over 1/B: how large the weight of a sample may be where means are meant."""
_FAR = 12
"""Operations between one sample's term and the sample, at most."""
_SAME_ELEMENTS = frozenset({"view", "reshape", "_unsafe_view", "permute", "transpose", "clone", "_to_copy"})
_PRODUCTS = frozenset({"dot", "mv", "mm", "bmm"})
_NORMS = frozenset({"linalg_vector_norm", "norm", "dist"})
_PICKS = frozenset({"select", "slice", "unbind", "split", "index"})


def sums_over_batch(program: Program, batch_size: int) -> bool:
    """True where the loss adds up terms of the samples that the states give, each with a weight well above 1/B.

    Weights are the numbers, and the constants, that sums are multiplied with or divided by. One of at most 1/B makes a
    mean, which stays one where it is scaled: four times a mean is no sum. A small part of a sum pulls no sample harder
    than a mean would, and is no matter. What is divided by a number that hangs on states itself is not found.
    """
    moving = depending({mark.state for mark in program.marks}, program.order)
    looked = _Looked(program, moving, batch_size)
    queue, seen = [(program.loss, 1.0)], set[Value]()
    single: dict[Value, list[float]] = defaultdict(list)
    while queue:
        value, weight = queue.pop()
        if value is None or value in seen or value not in moving or value.node is None:
            continue
        seen.add(value)
        node = value.node
        if (batch := looked.picked_from(value)) is not None:
            single[batch].append(abs(weight))
        elif looked.is_sum(node):
            if looked.is_heavy(weight * looked.weight_within(node)):
                return True
        elif (factor := looked.factor(node)) is not None:
            queue.extend((read, weight * factor) for read in node.values())
    return any(len(w) >= batch_size and looked.is_heavy(sum(w) / len(w)) for w in single.values())


def factor_at_end(program: Program, batch_size: int) -> float:
    """What the loss as a whole is multiplied with when all else is computed: 0.25 of ``mean(...) / 4``.

    1 where there is no such number, and where it makes a mean of a sum.
    """
    looked = _Looked(program, depending({mark.state for mark in program.marks}, program.order), batch_size)
    total = 1.0
    for node in () if program.loss is None else looked.chain(program.loss):
        if looked.is_sum(node):
            return 1.0
        if (number := looked.number_of(node)) is not None:
            total *= number
        elif name_of(node) not in _SAME_ELEMENTS:
            break
    return total


class _Looked:
    """What is asked of the operations of a program.

    Args:
        program: which.
        moving: its values that depend on states.
        batch_size: B.
    """

    def __init__(self, program: Program, moving: Set[Value], batch_size: int) -> None:
        self._program, self._moving, self._size = program, moving, batch_size

    def is_heavy(self, weight: float) -> bool:
        """Whether it is that of a sample in a sum, not in a mean."""
        return abs(weight) * self._size > _MOST

    def is_sum(self, node: Node) -> bool:
        """Whether the operation adds up over samples."""
        if not is_operator(node.func):
            return False
        if (reduction := reduction_of(node)) is not None:
            return reduction == SUM and any(self._size in value.shape for value in node.values())
        name, first, result = name_of(node), next(node.values(), None), node.results[0]
        if first is None or result is None:
            return False
        if name in ("sum", "nansum"):
            return self._size not in result.shape and self._has_samples(first)
        if name == "pow" and node.args[1] == 2:  # the square of a norm
            source = first.node
            return source is not None and name_of(source) in _NORMS and self._has_samples(source.args[0])
        to_one = name == "trace" or (name in _PRODUCTS and result.shape.numel() == 1)
        return to_one and self._has_samples(first)

    def _has_samples(self, value: Value) -> bool:
        """Whether a dimension is that of the samples, or holds them together with others after `flatten`."""
        for _ in range(_FAR):
            if self._size in value.shape:
                return True
            node, behind = value.node, self._behind(value)
            if node is None or behind is None or behind.shape.numel() != value.shape.numel():
                return False
            if name_of(node) not in _SAME_ELEMENTS and behind.shape != value.shape:
                return False
            value = behind
        return False

    def factor(self, node: Node) -> float | None:
        """What it multiplies all that it reads of states with; None if it does something else."""
        name = name_of(node)
        if name in TRANSPARENT or name in _SAME_ELEMENTS:
            return 1.0
        number = self.number_of(node)
        return None if number is None else self._averaged(number)

    def number_of(self, node: Node) -> float | None:
        """What a product, or a quotient by a number, multiplies with; None of another operation."""
        name = name_of(node)
        if name not in ("mul", "div") or (name == "div" and node.args[0] not in self._moving):
            return None
        number = self._constant_in(node)
        if number is None or (name == "div" and number == 0):
            return None
        return number if name == "mul" else 1 / number

    def _averaged(self, factor: float) -> float:
        """The factor; 0 where it makes a mean of a sum over as many as the samples at least, however that is scaled."""
        return 0.0 if abs(factor) * self._size <= 1 + 1e-6 else factor

    def weight_within(self, node: Node) -> float:
        """The mean weight that the samples were multiplied with before they were added up."""
        first = next(node.values())
        source = first.node
        if source is None or name_of(source) != "mul":
            return 1.0
        number = self._constant_in(source)
        return 1.0 if number is None else self._averaged(number)

    def _constant_in(self, node: Node) -> float | None:
        """The number that a product, or a quotient, of states has as its other factor; None where it has none."""
        others = [arg for arg in node.args[:2] if not (isinstance(arg, Value) and arg in self._moving)]
        return self._number(others[0]) if len(others) == 1 else None

    def _number(self, argument: object) -> float | None:
        """A number; of a constant with several elements the mean."""
        if isinstance(argument, int | float):
            return float(argument)
        if not isinstance(argument, Value) or (not argument.is_continuous and not argument.shape.numel()):
            return None
        content = self._content(argument)
        return None if content.is_complex() or not content.numel() else float(content.double().mean())

    def _content(self, value: Value) -> Tensor:
        """What a constant holds: given, or computed without states."""
        with torch.no_grad():
            held = Held(self._program.record)
            for node in ordered(self._program.record, [value]):
                held.run(node)
            return held[value].detach()

    def picked_from(self, value: Value) -> Value | None:
        """Of a term of one sample alone, the batch that it was picked from."""
        if value.shape.numel() != 1:
            return None
        for node in self.chain(value):
            source = node.args[0] if name_of(node) in _PICKS else None
            if isinstance(source, Value):
                result = node.results[0]
                taken = result is not None and self._size in source.shape and self._size not in result.shape
                return source if taken else None
        return None

    def chain(self, value: Value) -> Iterator[Node]:
        """The operations that it was computed by, as long as each reads one value of states."""
        for _ in range(_FAR):
            node, behind = value.node, self._behind(value)
            if node is None or behind is None:
                return
            yield node
            value = behind

    def _behind(self, value: Value) -> Value | None:
        """The one value of states that it was computed from; None where there are several, or none."""
        behind = [] if value.node is None else [read for read in value.node.values() if read in self._moving]
        return behind[0] if len(behind) == 1 else None
