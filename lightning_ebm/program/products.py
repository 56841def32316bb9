"""Where a program multiplies what depends on states by a weight, and how to send slopes back through another one."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.named import named
from lightning_ebm.program.operations import BATCH_NORMS, is_operator, traits
from lightning_ebm.program.record import Node, Value, depending

if TYPE_CHECKING:
    from lightning_ebm.program.interpreter import Program

_aten = torch.ops.aten

_FACTORS: Mapping[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.mv.default: (0, 1),
    _aten.dot.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
    _aten.addmv.default: (1, 2),
    _aten.convolution.default: (0, 1),
    _aten.linear.default: (0, 1),
}
"""Operations that are linear in each of two arguments, and where these stand."""

_GAINS = BATCH_NORMS | {"native_layer_norm", "native_group_norm"}
"""Operations whose weights are one number a unit, which the unit itself can hold."""


class Product(NamedTuple):
    """One operation whose result is linear in what depends on states, and in a weight.

    Attributes:
        name: of the layer that it leads to, ``"net.2"``, with ``"#1"`` and so on where it is not the first; ``"loss"``
            of what the loss computes from the last states.
        node: the operation.
        moving: position of the argument that depends on states.
        weight: position of the other one.
        read_out: whether it leads to the loss, and to no state.
    """

    name: str
    node: Node
    moving: int
    weight: int
    read_out: bool = False


def products_of(program: "Program") -> list[Product]:
    """The products of states and weights of a program, in an order that follows from what it computes alone.

    Raises:
        UnsupportedModuleError: between two states, or the last and the loss, lies more than one linear operation
            followed by what has no weights, so that feedback through another weight would not stop at a layer.
    """
    states = {mark.state for mark in program.marks}
    moving = depending(states, program.order)
    trained = depending(set(program.record.leaves), program.order)
    found: list[Product] = []
    ends = [(str(mark.key), mark.prediction) for mark in program.marks]
    for name, end in [*ends, *([] if program.loss is None else [("loss", program.loss)])]:
        nodes = _between(end, states, moving)
        own = [_product(name, node, moving, trained) for node in nodes]
        products = [product for product in own if product is not None]
        _check_single(name, products, states, moving)
        named = [p._replace(name=f"{name}#{k}") if k else p for k, p in enumerate(products)]
        found += [p._replace(read_out=end is program.loss) for p in named]
    return found


def _between(end: Value, states: set[Value], moving: set[Value]) -> list[Node]:
    """What leads from states to a value, from the value down, each operation once."""
    found: dict[Node, None] = {}
    queue = [end]
    while queue:
        value = queue.pop()
        if value in states or value not in moving or value.node is None or value.node in found:
            continue
        found[value.node] = None
        queue.extend(value.node.values())
    return list(found)


def _product(name: str, node: Node, moving: set[Value], trained: set[Value]) -> Product | None:
    """The operation as a product; None where no weight meets a state in it.

    Raises:
        UnsupportedModuleError: states meet states, or a weight in another way than in a product, a bias or a gain.
    """
    positions = _FACTORS.get(node.func)
    if positions is not None and len(node.args) > max(positions):
        left, right = (node.args[position] for position in positions)
        if right not in moving and right in trained:
            return Product(name, node, moving=positions[0], weight=positions[1])
        if left not in moving and left in trained:
            return Product(name, node, moving=positions[1], weight=positions[0])
        if left not in moving or right not in moving:
            return None  # a fixed wiring, such as an average over neighbors
        raise _refused(name, "multiplies states by states, as attention does")
    weighted = any(value in trained and value not in moving for value in node.values())
    pointwise = is_operator(node.func) and torch.Tag.pointwise in node.func.tags
    if weighted and not pointwise and _name(node.func) not in _GAINS:
        raise _refused(name, f"has weights in {_name(node.func)}, which is no product with a matrix or kernel")
    return None


def _name(func: Any) -> str:
    return traits(func).name if is_operator(func) else named(func).name


def _check_single(name: str, products: list[Product], states: set[Value], moving: set[Value]) -> None:
    own = {product.node for product in products}
    for product in products:
        below = _between(product.node.args[product.moving], states, moving)
        if own & set(below):
            raise _refused(name, "has two products with weights in a row and no state between them")


def _refused(name: str, why: str) -> UnsupportedModuleError:
    place = "What the loss computes from the last states" if name == "loss" else f"Layer {name!r}"
    return UnsupportedModuleError(
        f"{place} {why}. Feedback operators take the place of a transposed weight, which says where the signal of a"
        " layer goes only where one linear operation, followed by elementwise functions, lies between two states. Put"
        " a state there as well, layers=[...], or leave the feedback to autograd."
    )


class _SentBack(torch.autograd.Function):
    """The value of a product, whose slope in the state is that of the product with the operator.

    The value does not depend on the operator; the slope in the state does, and can be differentiated in it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, state: Tensor, operator: Tensor, product: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(state, operator)
        ctx.product = product
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        state, operator = ctx.saved_tensors
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            blank = state.detach().requires_grad_()  # any: it is linear
            (back,) = torch.autograd.grad(ctx.product(blank, operator), blank, slope, create_graph=graph)
        return slope, back, None, None


def sent_back_by(product: Product, operator: Tensor, crossed: bool = False) -> Any:
    """The operation, whose slope in the state goes back through `operator` in the place of the weight.

    Args:
        product: where it stands.
        operator: in the shape of the weight.
        crossed: the other way round: the value is that of the operator, and its slope goes back through the weight.
    """

    def run(*args: Any, **kwargs: Any) -> Tensor:
        weight, state = args[product.weight], args[product.moving]
        if operator.shape != weight.shape:
            raise UnsupportedModuleError(
                f"The feedback operator of {product.name!r} has the shape {tuple(operator.shape)}; expected"
                f" {tuple(weight.shape)}, that of the weight as the operation takes it."
            )
        fixed = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]

        def multiplied(moving: Tensor, by: Tensor) -> Tensor:
            given = [*fixed]
            given[product.moving], given[product.weight] = moving, by
            found: Tensor = product.node.func(*given, **kwargs)
            return found

        own, back = [*args], operator.to(weight.dtype)
        own[product.moving] = fixed[product.moving]
        if crossed:
            own[product.weight], back = back, fixed[product.weight]
        value = product.node.func(*own, **kwargs)
        found: Tensor = _SentBack.apply(value, state, back, multiplied)  # type: ignore[no-untyped-call]
        return found

    return run
