"""Matrix products with weights laid out once for the processor: a relaxation uses the same weights at every point.

Backprop uses a weight once in each direction, so that laying it out for the product costs more than it saves; here it
is paid back after a few points. Float32 on processors where it has been measured to be faster; all else stays as it is.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.tape import CONSTANT, STATE, Tape, Value
from lightning_ebm.writing import Op

_aten = torch.ops.aten
_FUSED = {_aten.tanh.default: "tanh", _aten.relu.default: "relu", _aten.sigmoid.default: "sigmoid"}
_PAID_BACK = 8
"""Within how many points the saving must exceed what the layout costs."""


class Shelf:
    """Weights as laid out in the present step: every kind of evaluation uses the same ones."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def clear(self) -> None:
        """Forgets them: a new step has begun, and weights have moved."""
        self._held = {}

    def laid_out(self, weight: Tensor, rows: int) -> Tensor:
        """For `_product`: x @ weight, x with that many rows."""
        key = weight.data_ptr(), weight.shape, weight.stride(), rows
        if key not in self._held:
            self._held[key] = _laid_out(weight, rows)
        return self._held[key]


def packed(
    tape: Tape, shelf: Shelf, opaque: bool, ops: Sequence[Op], wanted: Iterable[Value]
) -> tuple[list[Op], list[Op]]:
    """Rewrites products of something that moves with a weight that does not.

    Args:
        tape: the record, while its tensors are at hand: their shapes decide.
        shelf: keeps what is laid out for the other programs of the step.
        opaque: products are calls of one registered operator that finds the weights by number: compilers cannot take
            tensors of such a layout as inputs.
        ops: the operations of one point, with those before them.
        wanted: values that must still be computed.

    Returns:
        The operations that lay out weights, and the operations of a point with such weights; both empty if there is
        nothing to win.
    """
    made = {value: op for op in ops for value in op.results if value is not None}
    readers: dict[Value, list[Op]] = {}
    for op in ops:
        for value in op.reads():
            readers.setdefault(value, []).append(op)
    kept, layouts, rewritten = set(wanted), {}, list(ops)

    def tensor(value: Any) -> Tensor | None:
        if type(value) is not Value:
            return None
        op = made.get(value)
        if op is not None and op.func is _aten.t.default:
            base = tensor(op.args[0])
            return None if base is None else base.t()
        return tape.contents.get(value)

    for op in ops:
        if op.level != STATE or op.kwargs or op.func not in (_aten.mm.default, _aten.addmm.default):
            continue
        bias, x, weight = op.args if len(op.args) == 3 else (None, *op.args)
        matrix, result = tensor(weight), op.results[0]
        if matrix is None or result is None or result.shape is None or made_level(made, weight) != CONSTANT:
            continue
        rows, columns = result.shape
        if not _worth_it(matrix, rows):
            continue
        term = bias if bias is not None and bias.shape == result.shape else None  # no bias: something else to be added
        if term is None and bias is not None and (tensor(bias) is None or made_level(made, bias) != CONSTANT):
            continue
        if weight not in layouts:
            lay_out = partial(_stored, next(_numbers)) if opaque else shelf.laid_out
            layouts[weight] = Op(lay_out, (weight, rows), {}, [Value(None, CONSTANT)], True, CONSTANT)
        layout = layouts[weight].results[0]
        after = readers.get(result, [])
        activation = "none"
        if term is None and result not in kept and len(after) == 1 and _is_fused(after[0]):
            activation, result = _FUSED[after[0].func], after[0].results[0]  # type: ignore[index]
            rewritten.remove(after[0])
        new: list[Op] = []
        if opaque:
            number = layouts[weight].func.args[0]  # type: ignore[attr-defined]
            product = Value(None, STATE) if term is not None else result
            args = (x, None if term is not None else bias, number, columns, activation)
            new = [Op(_opaque_product(), args, {}, [product], True, STATE)]
            if term is not None:
                new.append(Op(_aten.add.Tensor, (product, term), {}, [result], True, STATE))
        elif term is not None:
            new = [Op(_sum, (x, term, layout), {}, [result], True, STATE)]
        else:
            new = [Op(_product, (x, layout, bias, activation), {}, [result], True, STATE)]
        place = rewritten.index(op)
        rewritten[place : place + 1] = new
    return (list(layouts.values()), rewritten) if layouts else ([], [])


def packed_once(ops: Sequence[Op]) -> list[Op]:
    """Rewrites large products of any two matrices, the second laid out for this one product."""
    return [
        Op(_packed_mm, op.args, {}, op.results, True, op.level) if op.func is _aten.mm.default else op for op in ops
    ]


def _packed_mm(left: Tensor, right: Tensor) -> Tensor:
    rows, columns = left.shape[0], right.shape[1]
    if _worth_it(right, rows, 1, rows * right.shape[0] + right.shape[0] * columns):
        return _product(left.contiguous(), _laid_out(right, rows), None, "none")
    return torch.mm(left, right)


def _is_fused(op: Op) -> bool:
    return op.func in _FUSED and op.level == STATE


def made_level(made: dict[Value, Op], value: Value) -> int:
    """What a value depends on."""
    return made[value].level if value in made else value.level


def _laid_out(weight: Tensor, rows: int) -> Tensor:
    """For `_product`: x @ weight, x with that many rows."""
    layout: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), rows)
    return layout


def _product(x: Tensor, layout: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layout, bias, activation, [], "")  # type: ignore[no-any-return]


def _sum(x: Tensor, term: Tensor, layout: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, term, layout, None, "add")  # type: ignore[no-any-return]


_numbers = itertools.count()
_layouts: dict[int, Tensor] = {}


def _stored(number: int, weight: Tensor, rows: int) -> Tensor:
    _layouts[number] = _laid_out(weight, rows)
    return _layouts[number]


@functools.cache
def _opaque_product() -> Callable[..., Any]:
    """`_product` as an operator that torch.compile leaves alone."""
    library = torch.library.Library("lightning_ebm", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("product(Tensor x, Tensor? bias, int layout, int columns, str activation) -> Tensor")  # type: ignore[no-untyped-call]

    def product(x: Tensor, bias: Tensor | None, layout: int, columns: int, activation: str) -> Tensor:
        return _product(x, _layouts[layout], bias, activation)

    def of_shape(x: Tensor, bias: Tensor | None, layout: int, columns: int, activation: str) -> Tensor:
        return x.new_empty((x.shape[0], columns))

    library.impl("product", product, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake("lightning_ebm::product", of_shape, lib=library)
    _libraries.append(library)  # an operator lives as long as its library
    return torch.ops.lightning_ebm.product.default


_libraries: list[Any] = []


def _worth_it(weight: Tensor, rows: int, times: int = _PAID_BACK, moved: int = 0) -> bool:
    """Whether so many products gain more than the layout costs, and so many elements moved besides."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.ndim != 2 or weight.is_complex():
        return False
    inner, columns = weight.shape
    saved = 1e-5 * rows * inner * columns  # microseconds, from the rates that `available` looks for
    return saved * times > 80 + 1e-3 * (inner * columns + moved) and available()


@functools.cache
def available() -> bool:
    """Whether this processor is faster with laid out weights, measured once: by a fifth or more."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with torch.no_grad():
        x, weight = torch.ones(128, 256), torch.ones(256, 256)
        try:
            layout = _laid_out(weight, 128)
            fast = _least(lambda: _product(x, layout, None, "none"))
        except RuntimeError:
            return False
        return fast < 0.8 * _least(lambda: torch.mm(x, weight))


def _least(function: Callable[[], Tensor]) -> float:
    """The shortest of ten runs, in seconds: what else the machine does makes none of them shorter."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
