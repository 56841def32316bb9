"""Faster ways to the same numbers on the CPU, for code that is run many times.

Products by the fastest way, with the activation that follows them where that is part of it; convolutions likewise.
Means over windows of 2 x 2 as sums of four strided views, bit for bit the same. Other types and devices stay as they
are.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.operators import as_operators
from lightning_ebm.capture.products import available, pays, product, product_and, small_product
from lightning_ebm.capture.values import Value
from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten
_FUSED: dict[Any, str] = {_aten.tanh.default: "tanh", _aten.relu.default: "relu", _aten.sigmoid.default: "sigmoid"}


def by_kernels(opaque: bool, ops: Sequence[Op], wanted: Iterable[Value]) -> list[Op]:
    """The same operations, each by the fastest way known, and fused with the activation that follows it.

    Args:
        opaque: for a compiler: products are calls of an operator that it leaves alone, all else is its own affair.
        ops: the operations of one stage, in order.
        wanted: values that must still be computed.
    """
    readers: dict[Value, list[Op]] = {}
    for op in ops:
        for value in op.reads():
            readers.setdefault(value, []).append(op)
    kept, rewritten = set(wanted), list(ops)

    def activation_after(value: Value) -> Op | None:
        after = readers.get(value, [])
        return after[0] if value not in kept and len(after) == 1 and after[0].func in _FUSED else None

    for op in ops:
        rule = (_PRODUCTS if opaque else _RULES).get(op.func)
        if rule is None or op.kwargs or op.results[0] is None:
            continue
        after = activation_after(op.results[0])
        found = rule(op, None if after is None else _FUSED[after.func])
        if found is None:
            continue
        function, args, fused = found
        results = op.results
        if fused and after is not None:
            results = after.results
            rewritten.remove(after)
        rewritten[rewritten.index(op)] = Op(function, args, {}, results[:1], True, op.level)
    return as_operators(rewritten) if opaque else rewritten


_Found = tuple[Callable[..., Tensor], tuple[Any, ...], bool] | None
"""The function to call instead, its arguments, and whether it applies the activation that follows."""


def _multiplied(op: Op, activation: str | None) -> _Found:
    bias, x, matrix = op.args if len(op.args) == 3 else (None, *op.args)
    (result,) = op.results
    assert result is not None
    shape = x.shape or matrix.shape
    if shape is None or not _is_float32(result):
        return None
    inner = shape[1] if x.shape else shape[0]
    if not pays(inner * result.shape.numel()):  # type: ignore[union-attr]
        return None
    if bias is not None and bias.shape == result.shape:  # no bias: something else to be added
        return product_and, (x, matrix, bias), False
    if bias is not None and (bias.shape is None or len(bias.shape) != 1):
        return None
    return product, (x, matrix, bias, activation or "none"), True


def _multiplied_small(op: Op, activation: str | None) -> _Found:
    """As it is, unless a tanh follows: by itself it takes as long as the product, and oneDNN's is worth its call."""
    x, matrix, bias = op.args
    (result,) = op.results
    assert result is not None
    count = matrix.shape[0] * result.shape.numel()  # type: ignore[union-attr]
    alone = bias is None or len(bias.shape) == 1
    return (product, (x, matrix, bias, "tanh"), True) if activation == "tanh" and alone and pays(count) else None


def _convolved(op: Op, activation: str | None) -> _Found:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = op.args
    (result,) = op.results
    plain = not transposed and result is not None and _is_float32(result) and len(result.shape or ()) == 4
    if activation is None or not plain or not available():
        return None
    return convolution, (x, weight, bias, stride, padding, dilation, groups, activation), True


def _pooled(op: Op, activation: str | None) -> _Found:
    x, *window = op.args
    return (mean_of_four, (x,), False) if _is_by_two(x, window) else None


def _spread(op: Op, activation: str | None) -> _Found:
    gradient, x, *window = op.args
    return (quarter_to_four, (gradient,), False) if _is_by_two(x, window) else None


def _joined(op: Op, activation: str | None) -> _Found:
    parts, *dim = op.args
    return (rows_together, parts, False) if dim in ([], [0]) else None


_PRODUCTS: dict[Any, Callable[[Op, str | None], _Found]] = {
    _aten.mm.default: _multiplied,
    _aten.addmm.default: _multiplied,
}
_RULES: dict[Any, Callable[[Op, str | None], _Found]] = {
    **_PRODUCTS,
    _aten.cat.default: _joined,
    small_product: _multiplied_small,
    _aten.convolution.default: _convolved,
    _aten.avg_pool2d.default: _pooled,
    _aten.avg_pool2d_backward.default: _spread,
}


def _is_float32(value: Value) -> bool:
    return value.shape is not None and value.dtype == torch.float32


def _is_by_two(x: Value, window: Sequence[Any]) -> bool:
    """Whether each mean is over two rows and two columns of its own, with none left."""
    defaults: tuple[Any, ...] = (), (), (0, 0), False, True, None
    size, stride, padding, ceil_mode, _, divisor = (*window, *defaults[len(window) :])
    if x.shape is None or len(x.shape) != 4 or x.shape[-1] % 2 or x.shape[-2] % 2 or ceil_mode or divisor:
        return False
    return size in ((2, 2), (2,)) and stride in ((2, 2), (2,), ()) and not any(padding)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """rho(x * weight + bias), with the sizes of `torch.nn.functional.conv2d`."""
    numbers = list(padding), list(stride), list(dilation), groups
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *numbers, activation, [], "")  # type: ignore[no-any-return]


def mean_of_four(x: Tensor) -> Tensor:
    """Means over windows of 2 x 2: ``(..., H / 2, W / 2)`` from ``(..., H, W)``."""
    total = x[..., ::2, ::2] + x[..., ::2, 1::2]
    total += x[..., 1::2, ::2]
    total += x[..., 1::2, 1::2]
    return total.mul_(0.25)


def quarter_to_four(gradient: Tensor) -> Tensor:
    """Its transpose."""
    *lead, rows, columns = gradient.shape
    spread, quarter = gradient.new_empty(*lead, 2 * rows, 2 * columns), gradient * 0.25
    for row in (0, 1):
        for column in (0, 1):
            spread[..., row::2, column::2] = quarter
    return spread


def rows_together(*parts: Tensor) -> Tensor:
    """The rows of one after those of another; no copy where they lie in memory like that already."""
    first, size = parts[0], parts[0].numel() * parts[0].element_size()
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for k, part in enumerate(parts):
        beside = part.data_ptr() == start + k * size and part.untyped_storage().data_ptr() == storage
        if not beside or part.shape != first.shape or not part.is_contiguous():
            return torch.cat(parts)
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())
