"""The first pass continued to complex states: its record, carried out once more in complex arithmetic.

An analytic function has one continuation, so that what agrees with the user's code on real states, operation by
operation, agrees with it around them as well, whichever of torch's functions it was written in. And as it is made of
the record alone, two steps with the same record have the same one: nothing else has to be compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.lowering import NotRepeatable, without_writing
from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.traits import traits
from lightning_ebm.capture.values import CONSTANT, Node, Value
from lightning_ebm.promotion import log_softmax
from lightning_ebm.substitution import Pass

_aten = torch.ops.aten


def continued(tape: Tape, first: Pass, states: Sequence[Tensor]) -> Pass:
    """Drives, predictions and the loss at other states, with their graphs, as the record of a pass has them.

    Args:
        tape: holds the pass and, if it is active, what is done here.
        first: the pass.
        states: complex leaves, in place of its own.

    Raises:
        NotRepeatable: an operation has no complex form that is known here.
    """
    roots = [t for call in first.layers for t in (call.prediction, call.drive)]
    here = dict(zip((tape.value(state) for state in first.states), states, strict=True))
    wanted = [tape.value(t) for t in (*roots, first.loss)]
    for node in _needed(tape, wanted, here):
        results = zip(node.results, _carried_out(node, here), strict=True)
        here.update({value: tensor for value, tensor in results if value is not None and tensor is not None})
    found = {id(root): here[value] for root, value in zip(roots, wanted, strict=False)}
    calls = {
        call.key: replace(call, drive=found[id(call.drive)], prediction=found[id(call.prediction)], state=state)
        for call, state in zip(first.layers, states, strict=True)
    }
    return replace(first, calls=[calls.get(call.key, call) for call in first.calls], loss=here[wanted[-1]])


def _needed(tape: Tape, wanted: Sequence[Value], here: dict[Value, Tensor]) -> list[Node]:
    """The operations between what is at hand and what is wanted, in order; notes what is at hand."""
    queue, nodes = list(wanted), set()
    while queue:
        value = queue.pop()
        if value in here:
            continue
        node = value.node
        if value.level == CONSTANT and (node is None or not traits(node.func).views):
            here[value] = _at_hand(tape, value)
        elif node is None:
            raise NotRepeatable("has inputs that are no states")
        elif node not in nodes:
            nodes.add(node)
            queue.extend(node.values())
            if traits(node.func).name == "native_dropout" and node.results[1] is not None:
                queue.append(node.results[1])
    return sorted(nodes, key=lambda node: node.index)


def _at_hand(tape: Tape, value: Value) -> Tensor:
    """The tensor that holds a value which does not depend on states, in its graph."""
    outside = tape.outside.get(value)
    if outside is not None and tape.value(outside) is value:
        return outside
    if value not in tape.contents:
        raise NotRepeatable("overwrites a tensor of the first pass that is used again")
    return tape.known_as(tape.contents[value], value)  # written to since, or in another tensor's memory


def _carried_out(node: Node, here: dict[Value, Tensor]) -> Sequence[Tensor | None]:
    if node.problem is not None:
        raise NotRepeatable(f"{node.func} {node.problem}")

    def given(arg: Any) -> Any:
        if type(arg) is Value:
            return here[arg]
        return [given(a) for a in arg] if type(arg) is tuple else arg

    kind = traits(node.func)
    args, kwargs = [given(a) for a in node.args], {name: given(a) for name, a in node.kwargs.items()}
    tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
    dtype = next((t.dtype for t in tensors if isinstance(t, Tensor) and t.is_complex()), None)
    with torch.set_grad_enabled(node.grad):
        if kind.name == "native_dropout":
            return _dropped(node, args, here), None
        func = without_writing(node) if kind.writes else node.func
        try:
            if dtype is None:
                result = func(*args, **kwargs)
            elif kind.name in _BY_PARTS:
                result = _by_parts(func, args, kwargs)
            elif kind.name in _CONTINUED:
                result = _CONTINUED[kind.name](*args, **kwargs)
            else:
                result = func(*_promoted(args, dtype), **kwargs)
        except RuntimeError as error:
            raise NotRepeatable(f"{node.func} has no complex form that is known here") from error
    results = list(result) if isinstance(result, list | tuple) else [result]
    return [*results, *[None] * (len(node.results) - len(results))]


def _dropped(node: Node, args: list[Any], here: dict[Value, Tensor]) -> Tensor:
    x, rate, training = args
    if not training or rate == 0:
        return x  # type: ignore[no-any-return]
    mask = here[node.results[1]]  # type: ignore[index]  # that of the first pass
    return x * mask * (0.0 if rate == 1 else 1 / (1 - rate))  # type: ignore[no-any-return]


def _promoted(arg: Any, dtype: torch.dtype) -> Any:
    if isinstance(arg, list):
        return [_promoted(a, dtype) for a in arg]
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _by_parts(func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """f(x) + i f(y) at x + i y, of a function that is linear with real coefficients in its first argument."""
    first, *others = args
    if any(isinstance(other, Tensor) and other.is_complex() for other in others):
        raise NotRepeatable(f"{func} has no complex form in which weights depend on states")
    return torch.complex(func(first.real, *others, **kwargs), func(first.imag, *others, **kwargs))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
    product: Tensor = _by_parts(_aten.convolution.default, [x, weight, None, *sizes], {})
    return product if bias is None else product + bias.view(-1, *[1] * (product.ndim - 2))


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return log_softmax(x, dim)


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return log_softmax(x, dim).exp()


def _mse(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    squares = (x - target).square()
    return squares if reduction == 0 else squares.mean() if reduction == 1 else squares.sum()


def _nll(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int = 1, ignore_index: int = -100
) -> Tensor:  # fmt: skip
    """sum_c -share_c x_c, with shares that are 0 but for the target's: a product, of which the slope is one too."""
    axis = 1 if x.ndim > 1 else 0
    along = [-1 if d == axis else 1 for d in range(x.ndim)]
    classes = torch.arange(x.shape[axis], device=x.device).view(along)
    shares = ((target.unsqueeze(axis) == classes) & (target != ignore_index).unsqueeze(axis)).to(x.real.dtype)
    shares = shares if weight is None else shares * weight.view(along)
    losses = -(x * shares)
    if reduction == 0:
        return losses.sum(axis)
    return losses.sum() / shares.sum() if reduction == 1 else losses.sum()


_BY_PARTS = frozenset(
    {"avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "constant_pad_nd"}
    | {"upsample_nearest2d", "upsample_bilinear2d", "_to_copy"}
)
_CONTINUED: dict[str, Callable[..., Tensor]] = {
    "convolution": _convolution,
    "_log_softmax": _log_softmax,
    "_softmax": _softmax,
    "mse_loss": _mse,
    "nll_loss_forward": _nll,
    "nll_loss2d_forward": _nll,
}
