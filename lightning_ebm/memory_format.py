"""Images with their channels last in memory, where that is faster: convolutions and poolings on processors.

What a tensor says is the same, only where its elements lie is not. States that a relaxation moves stay that way from
one point to the next; whatever runs the user's code is given them back as its own layers would have made them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.tape import CONSTANT, STATE, Tape, Value
from lightning_ebm.writing import Op

_aten = torch.ops.aten
_VIEWS = frozenset({_aten.view.default, _aten._unsafe_view.default})


def with_images(tape: Tape, ops: Sequence[Op], point: Iterable[Value]) -> tuple[list[Op], list[Op], bool]:
    """Rewrites the operations of a point: channels last if it has convolutions, else as it was recorded.

    Args:
        tape: the record, while its tensors are at hand.
        ops: what is carried out at every point.
        point: the inputs that move; they may come with channels last from other code of the same step.

    Returns:
        Preparations, the operations of a point, and whether channels are last.
    """
    convolved = [op for op in ops if op.func is _aten.convolution.default and len(_shape(op.results[0])) == 4]
    last = bool(convolved) and all(_is_float32_on_cpu(tape, op.args[1]) for op in convolved)
    moving, made = set(point), {v for op in ops for v in op.results}
    turned: dict[Value, Value] = {}
    ready: list[Op] = []
    entry: list[Op] = []

    def replaced(arg: Any) -> Any:
        if type(arg) is tuple:
            return tuple(replaced(a) for a in arg)
        if type(arg) is not Value or len(_shape(arg)) != 4 or arg in made or not (last or arg in moving):
            return arg
        if arg not in turned:
            level = STATE if arg in moving else CONSTANT
            turned[arg] = Value(None, level)
            turn = Op(to_channels_last if last else torch.Tensor.contiguous, (arg,), {}, [turned[arg]], True, level)
            (entry if arg in moving else ready).append(turn)
        return turned[arg]

    rewritten = []
    for op in ops:
        func = _aten.reshape.default if last and op.func in _VIEWS else op.func
        kwargs = {name: replaced(arg) for name, arg in op.kwargs.items()}
        rewritten.append(Op(func, replaced(op.args), kwargs, op.results, op.single, op.level))
    return ready, [*entry, *rewritten], last


def laid_out_as(states: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The states with their elements where those of others are."""
    return [
        x.contiguous() if y.is_contiguous() and not x.is_contiguous() else x for x, y in zip(states, like, strict=True)
    ]


def to_channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _shape(value: Value | None) -> Sequence[int]:
    return () if value is None or value.shape is None else value.shape


def _is_float32_on_cpu(tape: Tape, weight: Value) -> bool:
    tensor = tape.contents.get(weight)
    return tensor is not None and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
