"""Results written where an operand lay that nobody needs any more: large tensors are not asked of the system anew."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.elementwise import quick_tanh
from lightning_ebm.capture.kernels import rows_together
from lightning_ebm.capture.traits import traits
from lightning_ebm.capture.values import Value
from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten
_LARGE = 1 << 15
"""Elements from which it pays."""


def _tanh(x: Tensor) -> Tensor:
    e = x.clamp_(-20.0, 20.0).mul_(2.0).expm1_()
    return e.div_(e + 2.0)


_IN_PLACE: dict[Any, Callable[..., Tensor]] = {
    _aten.add.Tensor: Tensor.add_,
    _aten.mul.Tensor: Tensor.mul_,
    _aten.sub.Tensor: Tensor.sub_,
    _aten.neg.default: Tensor.neg_,
    _aten.relu.default: Tensor.relu_,
    _aten.clamp.default: Tensor.clamp_,
    _aten.sigmoid.default: Tensor.sigmoid_,
    _aten.hardsigmoid.default: torch.ops.aten.hardsigmoid_.default,
    quick_tanh: _tanh,
}
_SYMMETRIC = frozenset({_aten.add.Tensor, _aten.mul.Tensor})
_INTO: dict[Any, tuple[Callable[..., Tensor], str]] = {
    _aten.sub.Tensor: (torch.sub, "out"),
    _aten.tanh_backward.default: (_aten.tanh_backward.grad_input, "grad_input"),
    _aten.sigmoid_backward.default: (_aten.sigmoid_backward.grad_input, "grad_input"),
    _aten.threshold_backward.default: (_aten.threshold_backward.grad_input, "grad_input"),
}
"""Where the result may be written to either operand: how to be told, and under which name."""
_WRITING = frozenset(_IN_PLACE.values())


def reusing(ops: Sequence[Op], wanted: Collection[Value]) -> list[Op]:
    """The same operations, elementwise ones in place where the operand was made here and is read for the last time.

    Args:
        ops: of one point, in order.
        wanted: values that must be there at the end.
    """
    last: dict[Value, int] = {}
    shared: set[Value] = set(wanted)
    own: set[Value] = set()
    for index, op in enumerate(ops):
        last.update(dict.fromkeys(op.reads(), index))
        shares = getattr(op.func, "_schema", None) is not None and traits(op.func).shares
        if shares or op.func in _MAYBE_SAME:
            shared |= op.reads() | {value for value in op.results if value is not None}
        else:
            own |= {value for value in op.results if value is not None}
    return [_in_place(op, index, last, own - shared) for index, op in enumerate(ops)]


_MAYBE_SAME = frozenset({_aten.reshape.default, _aten.contiguous.default, rows_together})
"""What they return may lie where their argument does."""


def _in_place(op: Op, index: int, last: dict[Value, int], own: Collection[Value]) -> Op:
    (result, *others) = op.results
    if others or result is None or result.shape is None or result.shape.numel() < _LARGE:
        return op

    def dies(value: Any) -> bool:
        fits = type(value) is Value and (value.shape, value.dtype) == (result.shape, result.dtype)
        return fits and value in own and last[value] == index and sum(arg is value for arg in op.args) == 1

    func = None if op.kwargs else _IN_PLACE.get(op.func)
    orders = [op.args, (op.args[1], op.args[0])] if op.func in _SYMMETRIC else [op.args]
    for first, *rest in orders:
        if func is not None and dies(first):
            return Op(func, (first, *rest), {}, op.results, True, op.level)
    if op.func in _INTO and (dead := next(filter(dies, op.args), None)) is not None:
        func, name = _INTO[op.func]
        return Op(func, op.args, {**op.kwargs, name: dead}, op.results, True, op.level)
    return op


def written_by(op: Op) -> Value | None:
    """The operand where the result of an operation that `reusing` made is; None where it has memory of its own."""
    if op.func in _WRITING:
        return op.args[0]  # type: ignore[no-any-return]
    return next((op.kwargs[name] for func, name in _INTO.values() if func is op.func and name in op.kwargs), None)
