"""Matrix products by the faster of two libraries, with the activation that follows within the same call.

On some processors oneDNN multiplies float32 matrices about twice as fast as what torch calls for `mm`, and it applies
tanh to a product as it writes it, which by itself takes as long as the product. Which it is, is measured once. Other
types and devices stay as they are.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.tape import Value
from lightning_ebm.writing import Op

_aten = torch.ops.aten
_FUSED = {_aten.tanh.default: "tanh", _aten.relu.default: "relu", _aten.sigmoid.default: "sigmoid"}
_WORTH_IT = 1e6
"""Multiplications below which calling the other library costs more than it saves."""


def faster_products(opaque: bool, ops: Sequence[Op], wanted: Iterable[Value]) -> list[Op]:
    """The same operations, products by the faster library and fused with their activation.

    Args:
        opaque: products are calls of an operator that compilers leave alone.
        ops: the operations of one stage, in order.
        wanted: values that must still be computed.
    """
    readers: dict[Value, list[Op]] = {}
    for op in ops:
        for value in op.reads():
            readers.setdefault(value, []).append(op)
    kept, rewritten = set(wanted), list(ops)

    for op in ops:
        if op.kwargs or op.func not in (_aten.mm.default, _aten.addmm.default):
            continue
        bias, x, matrix = op.args if len(op.args) == 3 else (None, *op.args)
        result = op.results[0]
        assert result is not None
        if not _worth_it(x, matrix, result):
            continue
        term = bias if bias is not None and bias.shape == result.shape else None  # no bias: something else to be added
        if bias is not None and term is None and (bias.shape is None or len(bias.shape) != 1):
            continue
        after, place, activation = readers.get(result, []), rewritten.index(op), "none"
        if term is None and result not in kept and len(after) == 1 and after[0].func in _FUSED:
            activation, result = _FUSED[after[0].func], after[0].results[0]
            rewritten.remove(after[0])
        function, args = (product, (x, matrix, bias, activation)) if term is None else (product_and, (x, matrix, term))
        rewritten[place] = Op(_opaque(function) if opaque else function, args, {}, [result], True, op.level)
    return rewritten


def product(x: Tensor, matrix: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """rho(x @ matrix + bias), ``(M, N)`` from ``(M, K)``, ``(K, N)`` and ``(N,)``."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix.t(), bias, activation, [], "")  # type: ignore[no-any-return]


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
    return getattr(torch.ops.lightning_ebm, name).default  # type: ignore[no-any-return]


_libraries: list[Any] = []


def _worth_it(x: Value, matrix: Value, result: Value) -> bool:
    if result.shape is None or result.dtype != torch.float32:
        return False
    shape = x.shape or matrix.shape
    if shape is None:
        return False
    inner = shape[1] if x.shape else shape[0]
    return inner * result.shape.numel() > _WORTH_IT and available()


@functools.cache
def available() -> bool:
    """Whether oneDNN is the faster one on this processor, measured once: by a fifth or more."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with torch.no_grad():
        x, matrix = torch.ones(128, 256), torch.ones(256, 256)
        try:
            fast = _least(lambda: product(x, matrix, None, "none"))
        except RuntimeError:
            return False
        return fast < 0.8 * _least(lambda: torch.mm(x, matrix))


def _least(function: Callable[[], Tensor]) -> float:
    """The shortest of ten runs, in seconds: what else the machine does makes none of them shorter."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
