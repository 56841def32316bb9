"""Small products, and what they read by rows."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch

from lightning_ebm.capture.products import is_small, small_product
from lightning_ebm.capture.values import STATE, Value
from lightning_ebm.capture.writing import Op

_aten = torch.ops.aten
_TURNING = frozenset({_aten.t.default, _aten.transpose.int, _aten.permute.default})


def in_rows(
    ops: Sequence[Op], weights: Collection[Value], fused: Collection[Any]
) -> tuple[list[Op], dict[Value, Value]]:
    """The same operations, small float32 products as calls of one kernel, which reads its operands by rows.

    What depends on states and is turned round (the errors in e^T x, a gradient of weights) is copied where it stands.

    Args:
        ops: of all stages, in order.
        weights: what a batch fixes, and may be turned round and copied for x W^T, which reads W by columns. That takes
            as long as two products of 64 rows gain: it is for code that runs at many points of a batch.
        fused: activations that are better left together with the product before them.

    Returns:
        The operations, and for some of the weights W the value that stands for a copy of W^T that lies in rows.
    """
    made = {value: op for op in ops for value in op.results if value is not None}
    readers = Counter(value for op in ops for value in op.reads())
    together = {op.args[0] for op in ops if op.func in fused and readers[op.args[0]] == 1}
    copies: dict[Value, Value] = {}
    found: list[Op] = []

    def by_rows(matrix: Value, level: int) -> Value | None:
        """What holds these numbers row after row, as far as can be told."""
        op = made.get(matrix)
        if op is None or op.func not in _TURNING:
            return matrix
        if op.level >= STATE:
            copy = matrix.like()
            found.append(Op(_aten.contiguous.default, (matrix,), {}, [copy], True, level))
            return copy
        (weight, *how) = op.args
        return None if how or weight not in weights else copies.setdefault(weight, matrix.like())

    for op in ops:
        if _is_small(op) and op.results[0] not in together:
            term, x, matrix = op.args if op.func is _aten.addmm.default else (None, *op.args)
            rows = by_rows(matrix, op.level)
            x = None if rows is None else by_rows(x, op.level)
            if x is not None:
                op = Op(small_product, (x, rows, term), {}, op.results, True, op.level)
        found.append(op)
    return found, copies


def _is_small(op: Op) -> bool:
    if op.level < STATE or op.kwargs or op.func not in (_aten.mm.default, _aten.addmm.default):
        return False
    *_, x, matrix = op.args
    (result,) = op.results
    known: list[Any] = [x, matrix, result]
    if any(v is None or v.shape is None or len(v.shape) != 2 or v.dtype != torch.float32 for v in known):
        return False
    return is_small(x.shape[0] * x.shape[1] * matrix.shape[1])
