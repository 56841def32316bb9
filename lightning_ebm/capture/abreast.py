"""Several phases at once: the samples of all of them as rows of one tensor, where an operation takes rows one by one.

A product then has twice as many rows to spread the reading of its weights over, and half as many calls are made. What
mixes rows (a mean over the batch) is done for each phase by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lightning_ebm.capture.values import CONSTANT, Value
from lightning_ebm.capture.writing import Op, renamed

_aten = torch.ops.aten


class Abreast:
    """Operations of one phase, written for several.

    Args:
        ops: of one phase, with those that all phases share.
        inputs: for each phase, what stands for the inputs that differ between phases.
    """

    def __init__(self, ops: Sequence[Op], inputs: Sequence[Mapping[Value, Value]]) -> None:
        self.ops = [op for op in ops if op.level == CONSTANT]
        self._count = len(inputs)
        self._parts: dict[Value, list[Value]] = {v: [names[v] for names in inputs] for v in inputs[0]}
        self._whole: dict[Value, Value] = {}
        self._repeated: dict[Value, Value] = {}
        for op in ops:
            if op.level != CONSTANT and not self._together(op):
                self._apart(op)

    def parts(self, value: Value) -> list[Value]:
        """What stands for a value of each phase."""
        if value not in self._parts:
            whole = self._whole.get(value)
            if whole is None:  # the same in all phases
                return [value] * self._count
            rows = _sizes(value)[0]
            found = [value.like() for _ in range(self._count)]
            for k, part in enumerate(found):
                self._add(_aten.slice.Tensor, (whole, 0, k * rows, (k + 1) * rows), {}, [part], True, whole.level)
            self._parts[value] = found
        return self._parts[value]

    def _together(self, op: Op) -> bool:
        """Writes an operation once for the rows of all phases, if that gives the same."""
        rule = _pointwise if _is_pointwise(op) else _BY_ROWS.get(op.func)
        rows = {v for v in op.reads() if v in self._parts or v in self._whole}
        shapes = [v.shape for v in (*rows, *op.results) if v is not None]
        if rule is None or not all(shape is not None and len(shape) for shape in shapes):
            return False
        args = rule(op, rows, self._count)
        if args is None or any(v in rows for v in op.kwargs.values() if type(v) is Value):
            return False
        given = tuple(
            self._whole_of(a) if a in rows else self._repeat(a.value) if type(a) is _Repeated else a for a in args
        )
        results = [self._rows_of(value) if value is not None else None for value in op.results]
        self._whole.update({v: whole for v, whole in zip(op.results, results, strict=True) if v and whole})
        self._add(op.func, given, op.kwargs, results, op.single, op.level)
        return True

    def _apart(self, op: Op) -> None:
        each = [{v: self.parts(v)[k] for v in op.reads()} for k in range(self._count)]
        copies = [[value and value.like() for value in op.results] for _ in each]
        for values, results in zip(each, copies, strict=True):
            kwargs = {name: renamed(arg, values) for name, arg in op.kwargs.items()}
            self._add(op.func, renamed(op.args, values), kwargs, results, op.single, op.level)
        for value, *found in zip(op.results, *copies, strict=True):
            if value is not None:
                self._parts[value] = found

    def _whole_of(self, value: Value) -> Value:
        if value not in self._whole:
            self._whole[value] = whole = self._rows_of(value)
            self._add(_aten.cat.default, (tuple(self._parts[value]), 0), {}, [whole], True, value.level)
        return self._whole[value]

    def _repeat(self, value: Value) -> Value:
        """What all phases share, once for each."""
        if value not in self._repeated:
            self._repeated[value] = repeated = self._rows_of(value)
            self._add(_aten.cat.default, ((value,) * self._count, 0), {}, [repeated], True, CONSTANT)
        return self._repeated[value]

    def _rows_of(self, value: Value) -> Value:
        whole = value.like()
        rows, *others = _sizes(value)
        whole.shape = torch.Size([self._count * rows, *others])
        return whole

    def _add(self, func: Any, args: Any, kwargs: Any, results: list[Value | None], single: bool, level: int) -> None:
        self.ops.append(Op(func, args, kwargs, results, single, level))


class _Repeated:
    """A shared value, to be given once for each phase."""

    def __init__(self, value: Value) -> None:
        self.value = value


_Rule = Callable[[Op, set[Value], int], tuple[Any, ...] | None]
"""The arguments of an operation on the rows of all phases; None where it cannot be had that way.

Given are the operation, its arguments that have rows, and how many phases there are.
"""


def _is_pointwise(op: Op) -> bool:
    return torch.Tag.pointwise in getattr(op.func, "tags", ())


def _pointwise(op: Op, rows: set[Value], count: int) -> tuple[Any, ...] | None:
    shape = _sizes(op.results[0])
    if any(len(_sizes(v)) != len(shape) or _sizes(v)[0] != shape[0] for v in rows):
        return None
    return tuple(a if type(a) is not Value or a in rows else _along(a, shape) for a in op.args)


def _sizes(value: Value | None) -> torch.Size:
    assert value is not None
    assert value.shape is not None
    return value.shape


def _along(value: Value, shape: torch.Size) -> Value | _Repeated:
    """A shared value beside rows: as it is where all rows see the same of it."""
    same = len(_sizes(value)) == len(shape) and _sizes(value)[0] == shape[0] != 1
    return _Repeated(value) if same else value


def _first(op: Op, rows: set[Value], count: int) -> tuple[Any, ...] | None:
    """f(x, shared ...), x by rows."""
    x, *others = op.args
    return op.args if x in rows and not any(v in rows for v in others if type(v) is Value) else None


def _sum_of_product(op: Op, rows: set[Value], count: int) -> tuple[Any, ...] | None:
    term, x, matrix = op.args
    if x not in rows or matrix in rows:
        return None
    return (term if term in rows else _along(term, _sizes(op.results[0]))), x, matrix


def _every(op: Op, rows: set[Value], count: int) -> tuple[Any, ...]:
    """f(x, y, ...), all tensors by rows."""
    return tuple(_Repeated(a) if type(a) is Value and a not in rows else a for a in op.args)


def _reshaped(op: Op, rows: set[Value], count: int) -> tuple[Any, ...]:
    x, (first, *others), *rest = op.args
    return (x, (count * first if first > 0 else first, *others), *rest)


def _expanded(op: Op, rows: set[Value], count: int) -> tuple[Any, ...] | None:
    x, (first, *_) = op.args[:2]
    return _reshaped(op, rows, count) if len(x.shape) == len(op.args[1]) and first in (-1, x.shape[0]) else None


def _along_dims(op: Op, rows: set[Value], count: int) -> tuple[Any, ...] | None:
    """f(x ..., dim or dims, ...), over dimensions that are not the rows'."""
    tensors = [a for a in op.args if type(a) is Value]
    dims = op.args[len(tensors)] if len(op.args) > len(tensors) else None
    given = [dims] if type(dims) is int else list(dims or [0])
    return None if any(d % len(tensors[0].shape or ()) == 0 for d in given) else _every(op, rows, count)


def _permuted(op: Op, rows: set[Value], count: int) -> tuple[Any, ...] | None:
    return op.args if op.args[1][0] == 0 else None


def _transposed(op: Op, rows: set[Value], count: int) -> tuple[Any, ...] | None:
    ndim = len(op.args[0].shape)
    return op.args if all(d % ndim for d in op.args[1:3]) else None


_BY_ROWS: dict[Any, _Rule] = {
    _aten.mm.default: _first,
    _aten.addmm.default: _sum_of_product,
    _aten.bmm.default: _every,
    _aten.convolution.default: _first,
    _aten.avg_pool2d.default: _first,
    _aten.avg_pool2d_backward.default: _every,
    _aten.native_layer_norm.default: _first,
    _aten.clone.default: _first,
    _aten._to_copy.default: _first,
    _aten.view.default: _reshaped,
    _aten._unsafe_view.default: _reshaped,
    _aten.expand.default: _expanded,
    _aten.permute.default: _permuted,
    _aten.transpose.int: _transposed,
    _aten.sum.dim_IntList: _along_dims,
    _aten.mean.dim: _along_dims,
    _aten._softmax.default: _along_dims,
    _aten._log_softmax.default: _along_dims,
    _aten._softmax_backward_data.default: _along_dims,
    _aten._log_softmax_backward_data.default: _along_dims,
}
