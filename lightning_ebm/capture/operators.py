"""Products as operators that a compiler leaves alone, and calls from its own code."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.products import product, product_and, small_product, small_product_into
from lightning_ebm.capture.writing import Op

_SCHEMAS: dict[Callable[..., Any], str] = {
    product: "(Tensor x, Tensor matrix, Tensor? bias, str activation) -> Tensor",
    product_and: "(Tensor x, Tensor matrix, Tensor term) -> Tensor",
    small_product: "(Tensor x, Tensor matrix, Tensor? term) -> Tensor",
}


def as_operators(ops: Sequence[Op]) -> list[Op]:
    """The same operations, with products as operators."""
    return [replace(op, func=_operator(op.func)) if op.func in _SCHEMAS else op for op in ops]


@functools.cache
def _operator(function: Callable[..., Tensor]) -> Callable[..., Any]:
    name = function.__name__
    library = torch.library.Library("lightning_ebm", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(name + _SCHEMAS[function])  # type: ignore[no-untyped-call]

    def of_shape(x: Tensor, matrix: Tensor, *_: Any) -> Tensor:
        return x.new_empty((x.shape[0], matrix.shape[1]))

    library.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lightning_ebm::{name}", of_shape, lib=library)
    _libraries.append(library)  # an operator lives as long as its library
    operator = getattr(torch.ops.lightning_ebm, name).default
    _lower(function, operator)
    return operator  # type: ignore[no-any-return]


_libraries: list[Any] = []


def _lower(function: Callable[..., Tensor], operator: Any) -> None:
    """Compiled code calls the product itself instead of an operator, where this torch can be told so."""
    try:
        from torch._inductor import ir
        from torch._inductor.lowering import fallback_handler, lowerings, permute, register_lowering
        from torch._inductor.select_algorithm import ExternKernelChoice
    except ImportError:
        return
    handler: Any = fallback_handler
    plain = handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)
    add = lowerings[torch.ops.aten.add.Tensor]

    def lowered(x: Any, matrix: Any, bias: Any, activation: str) -> Any:
        return plain(x, permute(matrix, [1, 0]), bias, activation, [], "")

    def lowered_and(x: Any, matrix: Any, term: Any) -> Any:
        return add(lowered(x, matrix, None, "none"), term)  # with whatever else is done to the elements

    def lowered_small(x: Any, matrix: Any, term: Any) -> Any:
        x, matrix = (ir.ExternKernel.require_contiguous(t) for t in (x, matrix))
        layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [x.get_size()[0], matrix.get_size()[1]])
        found = small.bind((x, matrix), layout).output_node()  # type: ignore[no-untyped-call]
        return found if term is None else add(found, term)

    # Not where it is lowered: code that Inductor finds in its cache calls it by this name, too.
    name = f"lightning_ebm_{small_product_into.__name__}"
    small = ExternKernelChoice.lookup(name) or ExternKernelChoice(small_product_into, name=name)
    rule: Any = {product: lowered, product_and: lowered_and, small_product: lowered_small}[function]
    register_lowering(operator, type_promotion_kind=None)(rule)
