"""Complex numbers of straight-line code as pairs of real ones, and their arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lightning_ebm.capture import parts
from lightning_ebm.capture.values import Value, values_in
from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten
Part = Value | None
"""A real tensor; None is 0."""
Pair = tuple[Part, Part]
"""Real and imaginary part."""
Rule = Callable[..., Pair | Value | None]


def is_complex(value: Value) -> bool:
    """Whether the tensor was one of complex numbers."""
    return value.dtype is not None and value.dtype.is_complex


class Pairs:
    """Operations on parts, as they are made from those on complex numbers, one after the other.

    Args:
        rules: from an operation to what does the same with parts. A rule is given this object, the operation and its
            result, and returns the parts of that, or a real value that stands for it, or None for a case it leaves.
    """

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        self._rules = rules
        self.ops: list[Op] = []
        self._pairs: dict[Value, Pair] = {}
        self._sides: dict[Value, Pair] = {}
        self._wholes: dict[Value, Value] = {}
        self._levels: dict[Value, int] = {}

    def take(self, op: Op) -> None:
        """Carries out one operation, by its rule if it has one."""
        result = op.results[0]
        ours = [v for v in (*op.reads(), *op.results) if v is not None and (is_complex(v) or v in self._sides)]
        found = None
        if (
            (ours or op.func is _aten.select_backward.default)
            and op.single
            and result is not None
            and (rule := self._rules.get(op.func)) is not None
        ):
            found = rule(self, op, result)
        if found is None:
            kwargs = {name: self.whole(arg) for name, arg in op.kwargs.items()}
            self.ops.append(Op(op.func, self.whole(op.args), kwargs, op.results, op.single, op.level))
            self._levels.update({v: op.level for v in op.results if v is not None})
        elif isinstance(found, Value):
            assert result is not None
            self._wholes[result] = found
        elif result is not None:
            (self._pairs if is_complex(result) else self._sides)[result] = found

    def pair(self, number: Value) -> Pair:
        """The parts of a complex or real number."""
        if not is_complex(number):
            return self.joined(number), None
        if number not in self._pairs:  # they lie side by side in memory: products want them apart
            whole = self._wholes[number] = self.joined(number)
            real, imaginary = _real(number, shape_of(number)), _real(number, shape_of(number))
            self._emit(parts.apart, (whole,), [real, imaginary], single=False)
            self._pairs[number] = real, imaginary
        return self._pairs[number]

    def sides(self, value: Value) -> Pair | None:
        """The parts that lie side by side in the last dimension of a real tensor, if that is what it is."""
        return self._sides.get(value)

    def joined(self, value: Value) -> Value:
        """The number itself."""
        pair = self._sides.get(value) or self._pairs.get(value)
        if value in self._wholes or pair is None:
            return self._wholes.get(value, value)
        like = next(part for part in pair if part is not None)
        real, imaginary = (part or self.do(_aten.zeros_like.default, (like,), shape_of(like), like) for part in pair)
        self._wholes[value] = value
        if value in self._sides:
            self._emit(_aten.stack.default, ((real, imaginary), -1), [value])
        else:
            self._emit(_aten.complex.default, (real, imaginary), [value])
        return value

    def whole(self, arg: Any) -> Any:
        """An argument, with every number in it as one."""
        if type(arg) is Value:
            return self.joined(arg)
        return tuple(self.whole(a) for a in arg) if type(arg) is tuple else arg

    # Operations on parts

    def do(self, func: Any, args: tuple[Any, ...], shape: Sequence[int], like: Value, kwargs: Any = None) -> Value:
        """One real operation."""
        value = _real(like, shape)
        self._emit(func, args, [value], kwargs)
        return value

    def of(self, func: Any, x: Value, *more: Any) -> Value:
        """One that keeps the shape of its first argument."""
        return self.do(func, (x, *more), shape_of(x), x)

    def both(self, function: Any, x: Value, y: Value, *more: Any) -> Pair:
        """One with two results, real and imaginary part, in the shape of its arguments."""
        pair = _real(x, shape_of(x)), _real(x, shape_of(x))
        self._emit(function, (x, y, *more), list(pair), single=False)
        return pair

    def _emit(
        self, func: Any, args: tuple[Any, ...], results: Sequence[Value], kwargs: Any = None, single: bool = True
    ) -> None:
        level = max((self._levels.get(v, v.level) for v in values_in(args)), default=results[0].level)
        for value in results:
            self._levels[value] = value.level = level
        self.ops.append(Op(func, args, kwargs or {}, list(results), single, level))

    def negative(self, x: Part) -> Part:
        """-x."""
        return None if x is None else self.of(_aten.neg.default, x)

    def spread(self, x: Part, shape: Sequence[int]) -> Part:
        """x, in this shape."""
        if x is None or tuple(shape_of(x)) == tuple(shape):
            return x
        return self.do(_aten.expand.default, (x, tuple(shape)), shape, x)

    def sum(self, x: Part, y: Part, shape: Sequence[int], less: bool = False) -> Part:
        """x + y, or x - y."""
        if x is None or y is None:
            return self.spread(x if y is None else self.negative(y) if less else y, shape)
        return self.do(_aten.sub.Tensor if less else _aten.add.Tensor, (x, y), shape, x)

    def product(self, x: Part, y: Any, shape: Sequence[int], by: Any = _aten.mul.Tensor) -> Part:
        """x y, or what else is linear in both."""
        return None if x is None or y is None else self.do(by, (x, y), shape, x)

    def times(self, x: Pair, y: Pair, shape: Sequence[int], by: Any = _aten.mul.Tensor) -> Pair:
        """The same of complex numbers."""
        (a, b), (c, d) = x, y
        real = self.sum(self.product(a, c, shape, by), self.product(b, d, shape, by), shape, less=True)
        return real, self.sum(self.product(a, d, shape, by), self.product(b, c, shape, by), shape)

    def over(self, x: Pair, y: Pair, shape: Sequence[int]) -> Pair:
        """x / y, by the conjugate over the square of the modulus."""
        if y[1] is None:
            return self.by_number(x, y[0], shape)
        within = shape_of(y[1])
        squares = self.sum(self.product(y[0], y[0], within), self.product(y[1], y[1], within), within)
        return self.times(x, self.by_number((y[0], self.negative(y[1])), squares, within), shape)

    def by_number(self, x: Pair, divisor: Any, shape: Sequence[int]) -> Pair:
        """x over a real number."""
        return self.product(x[0], divisor, shape, _aten.div.Tensor), self.product(
            x[1], divisor, shape, _aten.div.Tensor
        )


def shape_of(value: Value) -> torch.Size:
    """The shape, which every value of these operations has."""
    assert value.shape is not None
    return value.shape


def _real(like: Value, shape: Sequence[int]) -> Value:
    value = like.like()
    value.shape = torch.Size(shape)
    value.dtype = like.dtype.to_real() if like.dtype is not None else None
    return value
