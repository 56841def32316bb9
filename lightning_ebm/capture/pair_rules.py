"""Code on complex numbers as code on pairs of real ones.

Most of what meets in such code is not complex but real, promoted: weights, targets, factors. Products with these are
two real ones instead of the four of complex arithmetic, and where only a real part is asked for, as in the gradient of
a weight, what leads to the imaginary one is not computed at all. What has no rule is left in complex numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lightning_ebm.capture import parts
from lightning_ebm.capture.pairs import Pair, Pairs, Rule, is_complex, shape_of
from lightning_ebm.capture.values import Value, values_in
from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten


def in_pairs(ops: Sequence[Op], outputs: Sequence[Value]) -> tuple[list[Op], list[Value]]:
    """The same values by other operations; as they are if nothing in them is complex.

    Args:
        ops: in order.
        outputs: what is asked for, in complex numbers where it was.

    Returns:
        The operations, and the values of the outputs.
    """
    if not any(is_complex(v) for op in ops for v in (*op.reads(), *op.results) if v is not None):
        return list(ops), list(outputs)
    pairs = Pairs(_RULES)
    for op in ops:
        pairs.take(op)
    return pairs.ops, [pairs.joined(value) for value in outputs]


def _parted(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    """f(x) + i f(y), of a function that is linear with real coefficients in its first argument."""
    first, *others = op.args
    if any(is_complex(v) for v in values_in(tuple(others))) or not is_complex(result) or op.kwargs.get("dtype"):
        return None
    args = pairs.whole(tuple(others))
    real, imaginary = (
        None if part is None else pairs.do(op.func, (part, *args), shape_of(result), part, op.kwargs)
        for part in pairs.pair(first)
    )
    return real, imaginary


def _promoted(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    (source,) = op.args
    if not is_complex(result) or set(op.kwargs) - {"dtype"} or source.dtype is None:
        return None
    real = result.dtype.to_real()  # type: ignore[union-attr]  # complex, as was asked
    if source.dtype.to_real() == real:
        return pairs.pair(source)
    parts_of = pairs.pair(source)
    first, second = (
        None if p is None else pairs.do(op.func, (p,), shape_of(result), result, {"dtype": real}) for p in parts_of
    )
    return first, second


def _sum(less: bool) -> Rule:
    def rule(pairs: Pairs, op: Op, result: Value) -> Pair | None:
        x, y = op.args
        if op.kwargs or type(x) is not Value or type(y) is not Value or not is_complex(result):
            return None
        (a, b), (c, d), shape = pairs.pair(x), pairs.pair(y), shape_of(result)
        return pairs.sum(a, c, shape, less), pairs.sum(b, d, shape, less)

    return rule


def _product(by: Any) -> Rule:
    def rule(pairs: Pairs, op: Op, result: Value) -> Pair | None:
        x, y = op.args
        if type(x) is not Value or not is_complex(result) or isinstance(y, complex):
            return None
        shape = shape_of(result)
        if type(y) is Value:
            return pairs.times(pairs.pair(x), pairs.pair(y), shape, by)
        a, b = pairs.pair(x)
        return pairs.product(a, y, shape, by), pairs.product(b, y, shape, by)

    return rule


def _quotient(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    x, y = op.args
    if op.kwargs or type(x) is not Value or not is_complex(result) or isinstance(y, complex):
        return None
    shape = shape_of(result)
    return pairs.over(pairs.pair(x), pairs.pair(y) if type(y) is Value else (y, None), shape)


def _affine(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    """c + x y."""
    if op.kwargs or len(op.args) != 3:
        return None
    (a, b), x, y = (pairs.pair(arg) for arg in op.args)
    shape = shape_of(result)
    if y[1] is None and x[0] is not None and x[1] is not None and b is None and a is not None:
        real = pairs.do(_aten.addmm.default, (a, x[0], y[0]), shape, a)
        return real, pairs.product(x[1], y[0], shape, _aten.mm.default)
    real_part, imaginary = pairs.times(x, y, shape, _aten.mm.default)
    return pairs.sum(real_part, a, shape), pairs.sum(imaginary, b, shape)


def _conjugate(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    real, imaginary = pairs.pair(op.args[0])
    return real, pairs.negative(imaginary)


def _function(of_both: Any) -> Rule:
    """An analytic function."""

    def rule(pairs: Pairs, op: Op, result: Value) -> Pair | None:
        real, imaginary = pairs.pair(op.args[0])
        if real is None or imaginary is None:
            return None
        return pairs.both(of_both, real, imaginary)

    return rule


def _slope_of_tanh(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    """g conj(1 - y^2)."""
    gradient, y = (pairs.pair(arg) for arg in op.args)
    if y[0] is None or y[1] is None:
        return None
    return pairs.times(gradient, pairs.both(parts.slope_of_tanh, y[0], y[1]), shape_of(result))


def _slope_of_sigmoid(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    """g conj(y (1 - y))."""
    gradient, y = (pairs.pair(arg) for arg in op.args)
    if y[0] is None or y[1] is None:
        return None
    return pairs.times(gradient, pairs.both(parts.slope_of_sigmoid, y[0], y[1]), shape_of(result))


def _power(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    x, exponent = op.args
    if type(x) is not Value or exponent not in (1, 2) or not is_complex(result):
        return None
    return pairs.pair(x) if exponent == 1 else pairs.times(pairs.pair(x), pairs.pair(x), shape_of(result))


def _again(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    return _parted(pairs, op, result) if op.kwargs else pairs.pair(op.args[0])


def _made(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    real, imaginary = (pairs.joined(arg) for arg in op.args)
    shape = shape_of(result)
    return pairs.spread(real, shape), pairs.spread(imaginary, shape)


def _laid_side_by_side(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    return pairs.pair(op.args[0])


def _selected(pairs: Pairs, op: Op, result: Value) -> Pair | Value | None:
    source, axis, index = op.args
    sides = pairs.sides(source)
    if sides is None:
        return _parted(pairs, op, result) if is_complex(result) else None
    if axis not in (-1, len(shape_of(source)) - 1) or index not in (0, 1):
        return None
    part, other = sides[index], sides[1 - index]
    if part is None and other is not None:
        part = pairs.of(_aten.zeros_like.default, other)
    return part


def _put_aside(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    gradient, sizes, axis, index = op.args
    if is_complex(result):
        return _parted(pairs, op, result)
    if axis not in (-1, len(sizes) - 1) or sizes[-1] != 2 or index not in (0, 1):
        return None
    part = pairs.joined(gradient)
    return (part, None) if index == 0 else (None, part)


def _taken_together(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    return pairs.sides(op.args[0])


def _ones(pairs: Pairs, op: Op, result: Value) -> Pair | None:
    like = next(part for part in pairs.pair(op.args[0]) if part is not None)
    return (pairs.of(op.func, like), None) if is_complex(result) else None


_PARTED = (
    _aten.neg.default, _aten.view.default, _aten._unsafe_view.default, _aten.t.default, _aten.transpose.int,
    _aten.permute.default, _aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.slice.Tensor, _aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim,
    _aten.slice_backward.default, _aten.gather.default, _aten.zeros_like.default,
)  # fmt: skip
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_PARTED, _parted),
    _aten._to_copy.default: _promoted,
    _aten.add.Tensor: _sum(less=False),
    torch.add: _sum(less=False),
    _aten.sub.Tensor: _sum(less=True),
    _aten.mul.Tensor: _product(_aten.mul.Tensor),
    _aten.mul.Scalar: _product(_aten.mul.Tensor),
    _aten.mm.default: _product(_aten.mm.default),
    _aten.bmm.default: _product(_aten.bmm.default),
    _aten.addmm.default: _affine,
    _aten.div.Tensor: _quotient,
    _aten._conj.default: _conjugate,
    _aten.clone.default: _again,
    _aten.tanh.default: _function(parts.tanh),
    _aten.sigmoid.default: _function(parts.sigmoid),
    _aten.exp.default: _function(parts.exp),
    _aten.log.default: _function(parts.log),
    _aten.tanh_backward.default: _slope_of_tanh,
    _aten.sigmoid_backward.default: _slope_of_sigmoid,
    _aten.pow.Tensor_Scalar: _power,
    _aten.complex.default: _made,
    _aten.view_as_real.default: _laid_side_by_side,
    _aten.select.int: _selected,
    _aten.select_backward.default: _put_aside,
    _aten.view_as_complex.default: _taken_together,
    _aten.ones_like.default: _ones,
}
"""From an operation on complex numbers to what it does to their parts."""
