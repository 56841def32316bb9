"""Faster ways to the same numbers on the CPU, for code that is run many times.

Measured once: on some processors oneDNN multiplies float32 matrices about twice as fast as what torch calls for `mm`,
and applies tanh as it writes a product or a convolution, which by itself takes as long as the product. Always: means
over windows of 2 x 2 as sums of four strided views, bit for bit the same. Other types and devices stay as they are.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.values import Value
from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten
_FUSED: dict[Any, str] = {_aten.tanh.default: "tanh", _aten.relu.default: "relu", _aten.sigmoid.default: "sigmoid"}
_WORTH_IT = 1e6
"""Multiplications below which calling the other library costs more than it saves."""


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
        rule = _RULES.get(op.func)
        if rule is None or op.kwargs or op.results[0] is None:
            continue
        after = activation_after(op.results[0])
        found = rule(op, None if after is None else _FUSED[after.func])
        if found is None or (opaque and found[0].__name__ not in _SCHEMAS):
            continue
        function, args, fused = found
        results = op.results
        if fused and after is not None:
            results = after.results
            rewritten.remove(after)
        rewritten[rewritten.index(op)] = Op(
            _opaque(function) if opaque else function, args, {}, results[:1], True, op.level
        )
    return rewritten


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
    if not _pays(inner * result.shape.numel()):  # type: ignore[union-attr]
        return None
    if bias is not None and bias.shape == result.shape:  # no bias: something else to be added
        return product_and, (x, matrix, bias), False
    if bias is not None and (bias.shape is None or len(bias.shape) != 1):
        return None
    return product, (x, matrix, bias, activation or "none"), True


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


_RULES: dict[Any, Callable[[Op, str | None], _Found]] = {
    _aten.cat.default: _joined,
    _aten.mm.default: _multiplied,
    _aten.addmm.default: _multiplied,
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


def product(x: Tensor, matrix: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """rho(x @ matrix + bias), ``(M, N)`` from ``(M, K)``, ``(K, N)`` and ``(N,)``."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix.t(), bias, activation, [], "")  # type: ignore[no-any-return]


def quick_mm(x: Tensor, matrix: Tensor) -> Tensor | None:
    """x @ matrix, ``(M, N)`` from ``(M, K)`` and ``(K, N)``; None where that is no faster than torch's."""
    return product(x, matrix, None, "none") if _fits(x, matrix) else None


def quick_addmm(bias: Tensor, x: Tensor, matrix: Tensor, **scales: Any) -> Tensor | None:
    """x @ matrix + bias, with ``(N,)`` besides; None where that is no faster than torch's."""
    plain = not scales and bias.ndim == 1 and bias.dtype == x.dtype
    return product(x, matrix, bias, "none") if plain and _fits(x, matrix) else None


def _fits(x: Tensor, matrix: Tensor) -> bool:
    plain = x.dtype == matrix.dtype == torch.float32 and x.device.type == "cpu"
    return plain and _pays(x.numel() * matrix.shape[1])


def _pays(multiplications: int) -> bool:
    return multiplications >= _WORTH_IT and available()


QUICK_PRODUCTS: Mapping[int, Callable[..., Tensor | None]] = {
    id(_aten.mm.default): quick_mm,
    id(_aten.addmm.default): quick_addmm,
}
"""For the first pass of steps that are captured, by the operation's id, as its own hash is slow."""


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


def product_and(x: Tensor, matrix: Tensor, term: Tensor) -> Tensor:
    """x @ matrix + term, ``(M, N)`` from ``(M, K)``, ``(K, N)`` and ``(M, N)``."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, term, matrix.t(), None, "add")  # type: ignore[no-any-return]


_SCHEMAS = {
    "product": "(Tensor x, Tensor matrix, Tensor? bias, str activation) -> Tensor",
    "product_and": "(Tensor x, Tensor matrix, Tensor term) -> Tensor",
}


@functools.cache
def _opaque(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """One of the above as an operator that torch.compile leaves alone."""
    name = function.__name__
    library = torch.library.Library("lightning_ebm", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(name + _SCHEMAS[name])  # type: ignore[no-untyped-call]

    def of_shape(x: Tensor, matrix: Tensor, *_: Any) -> Tensor:
        return x.new_empty((x.shape[0], matrix.shape[1]))

    library.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lightning_ebm::{name}", of_shape, lib=library)
    _libraries.append(library)  # an operator lives as long as its library
    _lower(name)
    return getattr(torch.ops.lightning_ebm, name).default  # type: ignore[no-any-return]


_libraries: list[Any] = []


def _lower(name: str) -> None:
    """Compiled code calls oneDNN itself instead of coming back to Python for it, where this torch can be told so."""
    try:
        from torch._inductor.lowering import fallback_handler, lowerings, permute, register_lowering
    except ImportError:
        return
    handler: Any = fallback_handler
    plain = handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)

    def lowered(x: Any, matrix: Any, *others: Any) -> Any:
        turned = permute(matrix, [1, 0])
        if name == "product":
            bias, activation = others
            return plain(x, turned, bias, activation, [], "")
        (term,) = others  # added with whatever else is done to the elements
        return lowerings[_aten.add.Tensor](plain(x, turned, None, "none", [], ""), term)

    register_lowering(getattr(torch.ops.lightning_ebm, name).default, type_promotion_kind=None)(lowered)


@functools.cache
def available() -> bool:
    """Whether oneDNN is the faster one on this processor, measured once: by a fifth or more."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with torch.no_grad():
        x, matrix = torch.ones(128, 256), torch.ones(256, 256)
        try:
            fast = least_time(lambda: product(x, matrix, None, "none"))
        except RuntimeError:
            return False
        return fast < 0.8 * least_time(lambda: torch.mm(x, matrix))


def least_time(function: Callable[[], object]) -> float:
    """The shortest of ten runs, in seconds: what else the machine does makes none of them shorter."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
