"""The updates of several phases as one: products over the stacked batch instead of one for each phase.

dE/dtheta is linear in what each phase contributes. Where a factor is the same in all phases (the input of the first
layer) the others are added before the product, which then costs what it costs for one phase.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_ebm.capture.values import CONSTANT, Value
from lightning_ebm.capture.writing import Op, renamed

_aten = torch.ops.aten
_LINEAR = frozenset(
    {
        _aten.t.default, _aten.view.default, _aten._unsafe_view.default, _aten.sum.dim_IntList, _aten.neg.default,
        _aten.permute.default, _aten.transpose.int, _aten.expand.default, _aten.unsqueeze.default,
        _aten.squeeze.dim, _aten.mul.Tensor, _aten.div.Tensor, _aten.avg_pool2d_backward.default,
    }
)  # fmt: skip
"""f(x + y, ...) = f(x, ...) + f(y, ...) for the first argument."""

Phase = tuple[Mapping[Value, Value], Mapping[Value, Op]]


class Contrast:
    """Copies of operations for several phases, and the sums of what these arrive at.

    Args:
        ops: the operations of one phase, with those that all phases share.
        inputs: for each phase, what stands for the inputs that differ between phases.
    """

    def __init__(self, ops: Sequence[Op], inputs: Sequence[Mapping[Value, Value]]) -> None:
        self.ops = [op for op in ops if op.level == CONSTANT]
        self._names = [dict(given) for given in inputs]
        self._made: dict[Value, tuple[Op, int]] = {}
        self._sums: dict[tuple[Value, ...], Value] = {}
        self._products: dict[tuple[Value, ...], list[Value | None]] = {}
        for names in self._names:
            for op in ops:
                if op.level == CONSTANT:
                    continue
                results = [value and value.like() for value in op.results]
                names.update({old: new for old, new in zip(op.results, results, strict=True) if old and new})
                kwargs = {name: renamed(arg, names) for name, arg in op.kwargs.items()}
                self._add(Op(op.func, renamed(op.args, names), kwargs, results, op.single, op.level))

    def sum(self, value: Value) -> Value:
        """What stands for the sum of a value over the phases."""
        return self._sum(tuple(names.get(value, value) for names in self._names))

    def _add(self, op: Op) -> None:
        self.ops.append(op)
        self._made.update({value: (op, part) for part, value in enumerate(op.results) if value is not None})

    def _sum(self, values: tuple[Value, ...]) -> Value:
        if values not in self._sums:
            self._sums[values] = self._merged(values) or self._added(values)
        return self._sums[values]

    def _merged(self, values: tuple[Value, ...]) -> Value | None:
        made = [self._made.get(value) for value in values]
        if any(m is None for m in made):
            return None
        ops = [m[0] for m in made if m is not None]
        first, *others = ops
        part = made[0][1]  # type: ignore[index]  # none is None
        if any(op.func is not first.func for op in others):
            return None
        if first.func in _LINEAR and all(op.args[1:] == first.args[1:] and op.kwargs == first.kwargs for op in others):
            if not all(type(arg) is not Value or arg.level == CONSTANT for arg in first.args[1:]):
                return None
            return self._again(first, values, (self._sum(tuple(op.args[0] for op in ops)), *first.args[1:]))
        if first.func is _aten.mm.default:
            left, right = (tuple(op.args[k] for op in ops) for k in (0, 1))
            if len(set(right)) == 1:
                args = self._sum(left), right[0]
            elif len(set(left)) == 1:
                args = left[0], self._sum(right)
            else:
                args = self._joined(left, 1), self._joined(right, 0)
            return self._again(first, values, args)
        if first.func is _aten.convolution_backward.default and part > 0:
            return self._convolved(ops)[part]
        return None

    def _convolved(self, ops: Sequence[Op]) -> list[Value | None]:
        """Slopes of a convolution's weight and bias, by one operation for all phases and both slopes."""
        slopes, inputs = (tuple(op.args[k] for op in ops) for k in (0, 1))
        if slopes not in self._products:
            alike = len(set(inputs)) == 1
            slope = self._sum(slopes) if alike else self._joined(slopes, 0)
            into = inputs[0] if alike else self._joined(inputs, 0)
            first = ops[0]
            mask = (False, *first.args[-1][1:])
            results = [None, *(value and value.like() for value in first.results[1:])]
            self._add(Op(first.func, (slope, into, *first.args[2:-1], mask), first.kwargs, results, False, first.level))
            self._products[slopes] = results
        return self._products[slopes]

    def _joined(self, values: tuple[Value, ...], dim: int) -> Value:
        made = [self._made.get(value) for value in values]
        turned = [m[0] for m in made if m is not None and m[0].func is _aten.t.default]
        if len(turned) == len(values):  # rows lie together in memory, columns do not
            return self._new(_aten.t.default, (self._joined(tuple(op.args[0] for op in turned), 1 - dim),), turned[0])
        level = max(m[0].level if m is not None else v.level for v, m in zip(values, made, strict=True))
        return self._value(Op(_aten.cat.default, (values, dim), {}, [Value(None, level)], True, level))

    def _added(self, values: tuple[Value, ...]) -> Value:
        total = values[0]
        for value in values[1:]:
            made = [self._made[v][0].level if v in self._made else v.level for v in (total, value)]
            total = self._value(Op(_aten.add.Tensor, (total, value), {}, [values[0].like()], True, max(made)))
        return total

    def _again(self, op: Op, values: tuple[Value, ...], args: tuple[Any, ...]) -> Value:
        return self._value(Op(op.func, args, op.kwargs, [values[0].like()], op.single, op.level))

    def _new(self, func: Any, args: tuple[Any, ...], like: Op) -> Value:
        return self._value(Op(func, args, {}, [Value(None, like.level)], True, like.level))

    def _value(self, op: Op) -> Value:
        self._add(op)
        assert op.results[0] is not None
        return op.results[0]
