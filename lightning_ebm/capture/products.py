"""Products of float32 matrices on the CPU, by the fastest way known for their size.

Measured on the processors at hand: oneDNN multiplies about twice as fast as what torch calls for `mm` on some, with
the weights as they lie in memory, and applies an activation as it writes. But a call of it costs ten microseconds, a
quarter of a product of 64 x 256 x 256. torch has a function that runs one of oneDNN's kernels on bare pointers, made
for the C++ that Inductor writes (`at::native::cpublas::brgemm`, ATen/native/CPUBlas.h): a call costs one microsecond.
It works in one thread, and reads the rows of its second operand as rows. So products of medium size are that kernel's,
large ones oneDNN's, and the smallest stay torch's.
"""

import ctypes
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_WORTH_IT = 1e6
"""Multiplications below which products are torch's, bit for bit: calling oneDNN costs more than it saves."""
_SMALL = 1.6e7
"""Multiplications up to which its kernel alone is the faster one, as its operands stay in the cache of one core."""


def product(x: Tensor, matrix: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """rho(x @ matrix + bias), ``(M, N)`` from ``(M, K)``, ``(K, N)`` and ``(N,)``."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix.t(), bias, activation, [], "")  # type: ignore[no-any-return]


def product_and(x: Tensor, matrix: Tensor, term: Tensor) -> Tensor:
    """x @ matrix + term, ``(M, N)`` from ``(M, K)``, ``(K, N)`` and ``(M, N)``."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, term, matrix.t(), None, "add")  # type: ignore[no-any-return]


def small_product(x: Tensor, matrix: Tensor, term: Tensor | None) -> Tensor:
    """x @ matrix + term, ``(M, N)`` from ``(M, K)``, ``(K, N)`` and ``(M, N)`` or ``(N,)``, by one kernel.

    Operands whose rows do not lie in memory one element after the other are multiplied by torch.
    """
    shape = x.shape[0], matrix.shape[1]
    if not _in_rows(x, matrix):
        return torch.mm(x, matrix) if term is None else torch.addmm(term, x, matrix)
    out = x.new_empty(shape) if term is None else term.expand(shape).clone(memory_format=torch.contiguous_format)
    _multiply(kernel(), x, matrix, out, term is not None)
    return out


def small_product_into(x: Tensor, matrix: Tensor, *, out: Tensor) -> None:
    """out = x @ matrix, all three in rows: what compiled code calls."""
    _multiply(kernel(), x, matrix, out, False)


def _multiply(by: Callable[..., None] | None, x: Tensor, matrix: Tensor, out: Tensor, adds: bool) -> None:
    assert by is not None  # without which no code has small products
    (rows, columns), step, width = out.shape, x.stride(0), matrix.stride(0)
    at = x.data_ptr(), matrix.data_ptr(), out.data_ptr()
    by(rows, columns, x.shape[1], step, width, columns, adds, *at, False)


def _in_rows(x: Tensor, matrix: Tensor) -> bool:
    (step, one), (width, other) = x.stride(), matrix.stride()
    return one == other == 1 and step >= x.shape[1] and width >= matrix.shape[1]


def quick_mm(x: Tensor, matrix: Tensor) -> Tensor | None:
    """x @ matrix, ``(M, N)`` from ``(M, K)`` and ``(K, N)``; None where that is no faster than torch's."""
    return product(x, matrix, None, "none") if _fits(x, matrix) else None


def quick_addmm(bias: Tensor, x: Tensor, matrix: Tensor, **scales: Any) -> Tensor | None:
    """x @ matrix + bias, with ``(N,)`` besides; None where that is no faster than torch's."""
    plain = not scales and bias.ndim == 1 and bias.dtype == x.dtype
    return product(x, matrix, bias, "none") if plain and _fits(x, matrix) else None


def _fits(x: Tensor, matrix: Tensor) -> bool:
    plain = x.dtype == matrix.dtype == torch.float32 and x.device.type == "cpu"
    return plain and pays(x.numel() * matrix.shape[1])


QUICK_PRODUCTS: Mapping[int, Callable[..., Tensor | None]] = {
    id(_aten.mm.default): quick_mm,
    id(_aten.addmm.default): quick_addmm,
}
"""For the first pass of steps that are captured, by the operation's id, as its own hash is slow."""


def pays(multiplications: int) -> bool:
    """Whether a product of so many multiplications is oneDNN's."""
    return multiplications >= _WORTH_IT and available()


def is_small(multiplications: int) -> bool:
    """Whether a product of so many multiplications is its kernel's, if its operands lie in rows."""
    few = multiplications * torch.get_num_threads() <= _SMALL
    return few and multiplications >= _WORTH_IT and kernel() is not None


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


@functools.cache
def kernel() -> Callable[..., None] | None:
    """`torchs_kernel`, if it is faster than torch's product by a fifth, measured once."""
    found = torchs_kernel()
    if found is None:
        return None
    with torch.no_grad():
        x, matrix, out = torch.ones(64, 256), torch.ones(256, 64), torch.empty(64, 64)
        fast = least_time(lambda: _multiply(found, x, matrix, out, False))
        return found if fast < 0.8 * least_time(lambda: torch.mm(x, matrix)) else None


@functools.cache
def torchs_kernel() -> Callable[..., None] | None:
    """torch's call of one kernel of oneDNN's, if this torch has it and it multiplies.

    Of (M, N, K, row strides of A, B and C, whether C is added to, A, B, C, False). Its name spells the types of these:
    a torch in which they are others has no function of this name.
    """
    try:
        found = ctypes.PyDLL(torch._C.__file__)["_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"]
    except (AttributeError, OSError):  # other compilers spell names otherwise
        return None
    sizes, pointers = [ctypes.c_int64] * 6, [ctypes.c_void_p] * 3
    found.argtypes, found.restype = [*sizes, ctypes.c_bool, *pointers, ctypes.c_bool], None
    x, matrix, out = torch.ones(3, 5), torch.full((5, 7), 2.0), torch.ones(3, 7)
    _multiply(found, x, matrix, out, True)
    return found if bool((out == 11).all()) else None


def least_time(function: Callable[[], object]) -> float:
    """The shortest of ten runs, in seconds: what else the machine does makes none of them shorter."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
