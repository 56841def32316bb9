"""Activations by fewer or quicker operations, on processors in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.tape import Tape, Value
from lightning_ebm.writing import Op

_aten = torch.ops.aten


def quick_activations(tape: Tape, ops: Sequence[Op]) -> tuple[list[Op], bool]:
    """tanh and x log x by quicker ways, where that is worth a call; and whether there was any."""
    found = []
    for op in ops:
        quick = _QUICK.get(op.func)
        takes = op.args if quick is not quick_xlogx else op.args[:1]
        same = quick is not quick_xlogx or op.args[0] is op.args[1]
        worth = quick is not None and same and not op.kwargs and _is_large(tape, op.results[0])
        found.append(Op(quick, takes, {}, op.results, True, op.level) if worth else op)  # type: ignore[arg-type]
    return found, any(op.func in _QUICK.values() for op in found)


def quick_tanh(x: Tensor) -> Tensor:
    """tanh(x) = (e^2x - 1) / (e^2x + 1), by expm1 so that small x keep their digits: 3 units in the last place.

    Twice as fast as torch.tanh on processors without wide vectors.
    """
    e = torch.expm1(x.clamp(-20.0, 20.0).mul_(2.0))
    return e.div_(e + 2.0)


def quick_xlogx(x: Tensor) -> Tensor:
    """x log x for x >= 0, with 0 log 0 = 0; torch.xlogy, written for any two arguments, takes twice as long."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log_().mul_(x)


_QUICK: dict[Any, Callable[[Tensor], Tensor]] = {_aten.tanh.default: quick_tanh, _aten.xlogy.Tensor: quick_xlogx}


def _is_large(tape: Tape, result: Value | None) -> bool:
    tensor = None if result is None else tape.contents.get(result)
    if tensor is None or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return False
    return tensor.numel() >= 1 << 13
