"""What a record consists of: values, the operations that computed them, and the calls of modules that returned them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Meta = tuple[Any, ...]
"""Shape, strides, dtype and device of a tensor."""


class Value:
    """What one tensor holds at one moment: writing to the tensor makes another value. Values themselves hold no data.

    Attributes:
        node: what computed it; None for what came from outside of the record.
        meta: shape, strides, dtype and device; of what came from outside also whether it requires a gradient.
        poison: why it cannot be used any more, if it cannot.
        number: of a number that is an input, int or float; None of tensors.
    """

    __slots__ = ("meta", "node", "number", "poison")

    def __init__(self, node: "Node | None", meta: Meta) -> None:
        self.node = node
        self.meta = meta
        self.poison: str | None = None
        self.number: type | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        shape: torch.Size = self.meta[0]
        return shape

    @property
    def is_complex(self) -> bool:
        """Whether the tensor holds complex numbers."""
        dtype: torch.dtype = self.meta[2]
        return dtype.is_complex

    @property
    def is_continuous(self) -> bool:
        """Whether it can carry a gradient: integers and truth values cannot."""
        return is_continuous(self.meta[2])


class Node:
    """One operation.

    Attributes:
        func: an overload of an operator of torch, or a Python function over tensors.
        args: tensors among them are values.
        kwargs: likewise.
        written: positions, or names, of arguments that `func` writes to: it is given copies of them.
        results: one value a tensor returned (None for what is none), then those of the arguments written to.
    """

    __slots__ = ("args", "func", "kwargs", "results", "written")

    def __init__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: tuple[int | str, ...] = ()
    ) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.written = written
        self.results: list[Value | None] = []

    def __str__(self) -> str:
        return f"{self.func}({', '.join('tensor' if type(a) is Value else str(a) for a in self.args)})"

    def values(self) -> Iterator[Value]:
        """The values it reads."""
        yield from values_in(self.args)
        if self.kwargs:
            yield from values_in(tuple(self.kwargs.values()))


def values_in(arg: Any) -> Iterator[Value]:
    """The values among arguments of an operation, in order."""
    if type(arg) is Value:
        yield arg
    elif type(arg) is tuple:
        for part in arg:
            yield from values_in(part)


class StateKey(NamedTuple):
    """One state: the part-th tensor that the call-th call of a module returns. Single outputs have part 0."""

    name: str
    call: int
    part: int

    def __str__(self) -> str:
        suffix = f"#{self.call}" if self.call else ""
        return f"{self.name}{suffix}" + (f"[{self.part}]" if self.part else "")


class Mark:
    """One tensor returned by one call of a watched module: where a state may take the place of what was computed.

    Attributes:
        key: which call.
        module: the module called.
        drive: what an activation was called with; the prediction where the layer is a block.
        prediction: what the call returned.
        state: what everything downstream reads in its place; the result of a node whose function is `stands_for`.
        weighted: whether the module has parameters of its own.
    """

    __slots__ = ("drive", "key", "module", "prediction", "state", "weighted")

    def __init__(
        self,
        key: StateKey,
        module: nn.Module,
        drive: Value,
        prediction: Value,
        state: Value,
        weighted: bool,
    ) -> None:
        self.key = key
        self.module = module
        self.drive = drive
        self.prediction = prediction
        self.state = state
        self.weighted = weighted


def stands_for(prediction: Tensor, key: StateKey) -> Tensor:
    """Marks where a state may stand for a prediction; the prediction itself where none does."""
    return prediction


@dataclass
class Record:
    """What one pass of the user's code computed.

    Attributes:
        nodes: the operations, in order.
        inputs: what values that no operation here computed hold: parameters, the batch, constants. Tensors that were
            written to during the pass are held as copies of what was read.
        leaves: tensors that autograd takes for leaves, by their values.
        marks: calls of watched modules, in the order in which they returned.
        notes: what else two passes must have in common: hooks on saved tensors.
        hooks: gradient hooks on values, see `Tensor.register_hook`.
        heard: all of the user's that stand between its operations: those, and backward hooks of modules.
        reads: operations that turned tensors into Python numbers, with the value that was read.
        reads_graph: whether the pass looked at the graph that autograd made of it, where hooks can be put unseen.
        packs: whether code of the user's own keeps tensors for the backward pass, and may hand back others.
        overwritten: values whose memory has been written to where autograd does not look, see `UnseenWrites`.
        has_hooks: whether the user's gradient hooks stand between its operations.
        share: what the loss is multiplied by before it is differentiated, 1/N where N batches accumulate, as hooks are
            told.
        transformed: whether layers were called within a transform of torch.func, where they can carry no state.
        shapes: of the tensors that the module was called with, if it was.
        declared: sizes of batches, by modules that say where samples are, see `declared_size`.
        arguments: what it was called with first: the one positional argument, or all of them.
        kind: of numbers that torch made where nobody said, as of integers that are divided.
    """

    nodes: list[Node] = field(default_factory=list)
    inputs: dict[Value, Tensor] = field(default_factory=dict)
    leaves: dict[Value, Tensor] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hooks: dict[Value, list[Any]] = field(default_factory=dict)
    heard: list[Any] = field(default_factory=list)
    reads: list[tuple[str, Value]] = field(default_factory=list)
    reads_graph: bool = False
    packs: bool = False
    overwritten: set[Value] = field(default_factory=set)
    has_hooks: bool = False
    share: float = 1.0
    transformed: bool = False
    shapes: list[torch.Size] = field(default_factory=list)
    declared: set[int] = field(default_factory=set)
    arguments: Any = None
    kind: torch.dtype = field(default_factory=torch.get_default_dtype)

    def told(self) -> None:
        """The user's pass has been differentiated, and its hooks have been told."""
        for hook in self.heard:
            hook.over()


def is_continuous(dtype: torch.dtype) -> bool:
    """Whether tensors of this kind can carry a gradient: integers and truth values cannot."""
    return dtype.is_floating_point or dtype.is_complex


@cache
def eps_of(dtype: torch.dtype) -> float:
    """The relative rounding of a kind of number; 0 of integers and truth values."""
    return torch.finfo(dtype).eps if is_continuous(dtype) else 0.0


def depending(values: set[Value], order: Sequence[Node]) -> set[Value]:
    """The values that depend on these, and these."""
    found = set(values)
    for node in order:
        if any(value in found for value in node.values()):
            found.update(value for value in node.results if value is not None)
    return found


def meta_of(tensor: Tensor) -> Meta:
    dense = tensor.layout is torch.strided
    return tensor.shape, tensor.stride() if dense else tensor.layout, tensor.dtype, tensor.device


def outside_meta_of(tensor: Tensor) -> Meta:
    return *meta_of(tensor), is_leaf(tensor)


def is_leaf(tensor: Tensor) -> bool:
    """Whether autograd has a gradient for a tensor that no operation has computed."""
    try:
        return tensor.requires_grad and tensor.is_leaf and not is_borrowed(tensor)
    except RuntimeError:  # a view that nobody may use any more: made under no_grad, and written to outside of it
        return False


def is_borrowed(tensor: Tensor) -> bool:
    """Of a leaf: whether it is a view made under no_grad, a constant, which says that it requires a gradient as its
    base does.
    """
    base = tensor._base if tensor._is_view() else None
    return base is not None and base.requires_grad
