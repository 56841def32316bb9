"""Straight-line code without what arithmetic makes superfluous: zeros, factors of 1, signs that cancel, separate sums.

Errors of layers that no signal has reached are x - x, and so is 0 whatever they are sent through.

Gradients come with factors of one (the seed of a sum, spread over its shape) and a sign for every difference. Nothing
here changes a result by more than the order in which a product and a sum are rounded.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lightning_ebm.capture.values import PHASE, Value
from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten
_SPREAD = frozenset(
    {
        _aten.expand.default, _aten.view.default, _aten._unsafe_view.default, _aten.unsqueeze.default,
        _aten.select.int, _aten.t.default, _aten.permute.default, _aten.transpose.int, _aten.squeeze.dim,
        _aten.clone.default, _aten.slice.Tensor,
    }
)  # fmt: skip
"""What is the same number everywhere is so afterwards."""
_ODD = frozenset(
    {
        _aten.mm.default, _aten.t.default, _aten.view.default, _aten._unsafe_view.default, _aten.permute.default,
        _aten.transpose.int, _aten.convolution.default, _aten.avg_pool2d_backward.default,
        _aten.expand.default, _aten.unsqueeze.default,
    }
)  # fmt: skip
"""f(-x, ...) = -f(x, ...), at least for the first result; as for all slopes of functions, see `_is_slope`."""


_ZERO_AT_ZERO = frozenset(
    {
        _aten.mm.default, _aten.bmm.default, _aten.convolution.default, _aten._to_copy.default, _aten.sum.dim_IntList,
        _aten.linalg_vector_norm.default,
    }
)  # fmt: skip
"""f(0, ...) = 0, as for all slopes of functions: without a bias."""


class _Simpler:
    def __init__(self, ops: Sequence[Op], wanted: Iterable[Value]) -> None:
        self.ops: list[Op] = []
        self._instead: dict[Value, Value] = {}
        self._number: dict[Value, float] = {}
        self._spread: dict[Value, Value] = {}
        self._negated: dict[Value, Value] = {}
        self._made: dict[Value, Op] = {}
        self._readers: dict[Value, int] = dict.fromkeys(wanted, 2)
        for op in ops:
            for value in op.reads():
                self._readers[value] = self._readers.get(value, 0) + 1
        for op in ops:
            self._take(op)

    def plain(self, value: Value) -> Value:
        while value in self._instead:
            value = self._instead[value]
        return value

    def _take(self, op: Op) -> None:
        op.args = self._replaced(op.args)
        op.kwargs = {name: self._replaced(arg) for name, arg in op.kwargs.items()}
        if op.func is _aten.convolution_backward.default:
            _transpose(op)
        if not op.single:
            self._note(op)
            return
        (result,) = op.results
        assert result is not None
        rule = _RULES.get(op.func)
        number = self._uniform(op)
        if number is not None:
            self._number[result] = number
        elif op.func in _SPREAD and op.args[0].shape == () and op.args[0].dtype == result.dtype:
            self._spread[result] = op.args[0]
        elif op.func in _SPREAD and op.args[0] in self._spread:
            self._spread[result] = self._spread[op.args[0]]
        elif rule is not None and (same := rule(self, op, result)) is not None:
            self._instead[result] = same
            return
        self._note(op)

    def _note(self, op: Op) -> None:
        self.ops.append(op)
        self._made.update({value: op for value in op.results if value is not None})

    def _replaced(self, arg: Any) -> Any:
        if type(arg) is Value:
            return self.plain(arg)
        return tuple(self._replaced(a) for a in arg) if type(arg) is tuple else arg

    def _uniform(self, op: Op) -> float | None:
        """The number that every element of the result is."""
        if op.func in (_aten.ones_like.default, _aten.ones.default):
            return 1.0
        if op.func is _aten.full.default:
            return op.args[1] if type(op.args[1]) in (int, float) else None
        if op.func is _aten.sub.Tensor and op.args[0] is op.args[1] and not op.kwargs:
            return 0.0
        if op.func is _aten.mul.Tensor and 0 in (self._number.get(arg) for arg in op.args if type(arg) is Value):
            return 0.0
        if not op.args or type(op.args[0]) is not Value or op.args[0] not in self._number:
            return None
        if self._number[op.args[0]] == 0 and _is_zero_at_zero(op):
            return 0.0
        if op.func in _SPREAD:
            return self._number[op.args[0]]
        if op.func is _aten.neg.default:
            return -self._number[op.args[0]]
        if op.func is _aten.mul.Tensor:
            factor = self._number.get(op.args[1], op.args[1])
            return self._number[op.args[0]] * factor if type(factor) in (int, float) else None
        return None

    def product(self, op: Op, result: Value) -> Value | None:
        """x * 1 is x, x * -1 is -x, and x times a tensor of one number is x times that number."""
        left, right = op.args
        if left in self._number or left in self._spread:
            left, right = right, left
        if right in self._spread:
            scalar = self._spread[right]
            if type(left) is not Value:
                self._spread[result] = scalar if left == 1 else self._new(op.func, (scalar, left), scalar)
            elif left.shape == result.shape:
                op.args = left, scalar
            return None
        factor = self._number.get(right, right) if type(left) is Value else None
        if type(factor) not in (int, float) or (left.shape, left.dtype) != (result.shape, result.dtype):
            return None
        if factor == 1:
            return left  # type: ignore[no-any-return]
        if factor == -1:
            op.func, op.args = _aten.neg.default, (left,)
            return self.negation(op, result)
        op.args = (left, factor)
        return None

    def quotient(self, op: Op, result: Value) -> Value | None:
        """x / 1 is x."""
        left, right = op.args
        return left if right == 1 and (left.shape, left.dtype) == (result.shape, result.dtype) else None

    def negation(self, op: Op, result: Value) -> Value | None:
        """-(-x) is x; -f(-x) is f(x)."""
        if op.args[0] in self._spread:
            scalar = self._new(op.func, (self._spread[op.args[0]],), self._spread[op.args[0]])
            self._spread[result] = scalar
            return None
        same = self._less(op.args[0])
        if same is None:
            self._negated[result] = op.args[0]
        return same

    def _new(self, func: Any, args: tuple[Any, ...], like: Value) -> Value:
        value = like.like()
        self._note(Op(func, args, {}, [value], True, like.level))
        return value

    def _less(self, value: Value) -> Value | None:
        """The value that is minus this one, if it can be had without changing a sign."""
        if value in self._negated:
            return self._negated[value]
        if value.shape == () and value.level == PHASE:  # once a phase
            self._negated[value] = less = self._new(_aten.neg.default, (value,), value)
            return less
        op = self._made.get(value)
        if op is None or not _is_odd(op):
            return None
        if [r for r in op.results if r is not None] != [value]:
            return None
        same = self._less(op.args[0])
        if same is None:
            return None
        other = value.like()
        self._note(Op(op.func, (same, *op.args[1:]), op.kwargs, [other, *op.results[1:]], op.single, op.level))
        self._negated[value] = other
        return other

    def sum(self, op: Op, result: Value) -> Value | None:
        """c + a @ b is one operation; c - x is c + (-x) where that takes a sign away."""
        left, right = op.args
        if op.kwargs or type(left) is not Value or type(right) is not Value or left.dtype != right.dtype:
            return None
        if self._number.get(right) == 0 and left.shape == result.shape:
            return left
        if self._number.get(left) == 0 and right.shape == result.shape:
            if op.func is _aten.add.Tensor:
                return right
            op.func, op.args = _aten.neg.default, (right,)
            return self.negation(op, result)
        if op.func is _aten.sub.Tensor:
            less = self._less(right)
            if less is None:
                return None
            op.func, op.args, right = _aten.add.Tensor, (left, less), less
        for term, product in ((left, right), (right, left)):
            made = self._made.get(product)
            alone = self._readers.get(product, 1) == 1
            if made is None or made.func is not _aten.mm.default or term.shape != product.shape:
                continue
            if alone and made.level == op.level:  # a product of constants is computed once, elsewhere
                op.func, op.args = _aten.addmm.default, (term, *made.args)
                break
        return None


def _is_zero_at_zero(op: Op) -> bool:
    if op.func is _aten.convolution.default and op.args[2] is not None:
        return False
    return op.func in _ZERO_AT_ZERO or _is_slope(op)


def _is_odd(op: Op) -> bool:
    if op.func is _aten.convolution.default and op.args[2] is not None:
        return False
    return op.func in _ODD or _is_slope(op)


def _is_slope(op: Op) -> bool:
    """Whether it is linear in its first argument, the slope above."""
    name = getattr(getattr(op.func, "_schema", None), "name", "")
    return name.endswith(("_backward", "_backward_data"))


def _transpose(op: Op) -> None:
    """The slope of a convolution's input alone needs not the input but its shape: it is a convolution itself."""
    slope, into, weight, _, stride, padding, dilation, transposed, _, groups, mask = op.args
    if mask != (True, False, False) or into.shape is None or slope.shape is None or weight.shape is None:
        return
    extra = (0,) * len(stride)
    if not transposed:
        sizes = zip(into.shape[2:], slope.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        extra = tuple(i - ((s - 1) * step - 2 * pad + gap * (k - 1) + 1) for i, s, k, step, pad, gap in sizes)
    op.func, op.single, op.results = _aten.convolution.default, True, op.results[:1]
    op.args = (slope, weight, None, stride, padding, dilation, not transposed, extra, groups)


_RULES: dict[Any, Callable[[_Simpler, Op, Value], Value | None]] = {
    _aten.mul.Tensor: _Simpler.product,
    _aten.div.Tensor: _Simpler.quotient,
    _aten.neg.default: _Simpler.negation,
    _aten.add.Tensor: _Simpler.sum,
    _aten.sub.Tensor: _Simpler.sum,
}


def simplified(ops: Sequence[Op], outputs: Sequence[Value]) -> tuple[list[Op], list[Value]]:
    """The same outputs by fewer operations.

    Args:
        ops: in order.
        outputs: what is asked for.

    Returns:
        The operations still needed, and the values of the outputs.
    """
    simpler = _Simpler(ops, outputs)
    outputs = [simpler.plain(value) for value in outputs]
    return needed(simpler.ops, outputs), outputs


def needed(ops: Sequence[Op], outputs: Iterable[Value]) -> list[Op]:
    """The operations that the outputs need; results that nobody reads are None."""
    wanted, found = set(outputs), []
    for op in reversed(ops):
        if any(value in wanted for value in op.results if value is not None):
            found.append(op)
            wanted |= op.reads()
    return found[::-1]
