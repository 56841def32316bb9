"""Activations by quicker operations, on processors in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten
_LARGE = 1 << 13
"""Elements from which it pays."""


def quick_activations(ops: Sequence[Op]) -> list[Op]:
    """tanh and x log x by quicker ways, where that is worth a call."""
    return [_quick(op) for op in ops]


def _quick(op: Op) -> Op:
    quick, result = _QUICK.get(op.func), op.results[0]
    if quick is None or op.kwargs or result is None or result.shape is None or result.dtype != torch.float32:
        return op
    if result.shape.numel() < _LARGE or any(arg is not op.args[0] for arg in op.args[1:]):
        return op
    return Op(quick, op.args[:1], {}, op.results, True, op.level)


def quick_tanh(x: Tensor) -> Tensor:
    """tanh(x) = (e^2x - 1) / (e^2x + 1), by expm1 so that small x keep their digits: 3 units in the last place.

    Twice as fast as torch.tanh on processors without wide vectors.
    """
    e = torch.expm1(x.clamp(-20.0, 20.0).mul_(2.0))
    return e.div_(e + 2.0)


def compiled_tanh(x: Tensor) -> Tensor:
    """tanh(x) in float32, for a compiler: a polynomial up to 0.625, 1 - 2 / (e^2|x| + 1) beyond.

    A third of the time of its own; within 2 units in the last place. Of other types nothing is made.

    Source: Moshier, Cephes Mathematical Library, tanhf.
    """
    if x.dtype != torch.float32:
        return NotImplemented  # type: ignore[no-any-return]
    size, square = x.abs(), x * x
    first, second, *others = _TANH
    series = square * first + second
    for coefficient in others:
        series = series * square + coefficient
    beyond = torch.copysign(1 - 2 / (torch.exp(2 * size) + 1), x)
    return torch.where(size < 0.625, x + x * square * series, beyond)


_TANH = -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1


def quick_xlogx(x: Tensor) -> Tensor:
    """x log x for x >= 0, with 0 log 0 = 0; torch.xlogy, written for any two arguments, takes twice as long."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log_().mul_(x)


_QUICK: dict[Any, Callable[[Tensor], Tensor]] = {_aten.tanh.default: quick_tanh, _aten.xlogy.Tensor: quick_xlogx}
