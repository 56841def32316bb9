"""What the values of a record hold while it runs again, operation by operation."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.program.at_value import at_value
from lightning_ebm.program.record import Node, Record, Value
from lightning_ebm.program.tensors import listed
from lightning_ebm.program.torch_faults import IN_PLACE_OF
from lightning_ebm.program.user_hooks import those_that_change


class Held:
    """What the values of a record hold in one run."""

    def __init__(self, record: Record, given: Mapping[Value, Tensor] = MappingProxyType({})) -> None:
        self._record = record
        self._tensors: dict[Value, Tensor] = dict(given)
        self._given_values = given
        self._kind = None if record.kind is torch.get_default_dtype() else record.kind
        self.instead: Mapping[Node, Any] = {}

    def __getitem__(self, value: Value) -> Tensor:
        found = self._tensors.get(value)
        if found is None:
            found = self._tensors[value] = self._given(value)
        return found

    def __setitem__(self, value: Value, tensor: Tensor) -> None:
        self._tensors[value] = tensor

    def hand_out(self, value: Value, state: Tensor) -> None:
        """A state to those downstream, with the hooks that the user put on what the layer returned."""
        hooks = those_that_change(self._record.hooks.get(value, ()))
        if hooks and state.requires_grad:
            state = state.view_as(state)
            for hook in hooks:
                state.register_hook(hook)
        self._tensors[value] = state

    def free(self, value: Value) -> None:
        """Nobody reads it any more."""
        self._tensors.pop(value, None)

    def _given(self, value: Value) -> Tensor:
        leaf = self._record.leaves.get(value)
        content = self._record.inputs[value] if leaf is None else self._record.inputs.get(value, leaf)
        if leaf is None:
            return content.detach() if content.requires_grad else content
        return leaf if content is leaf else at_value(leaf, content)

    def run(self, node: Node) -> None:
        """One operation."""
        args = self._filled(node.args)
        kwargs = {name: self._filled_one(arg) for name, arg in node.kwargs.items()} if node.kwargs else node.kwargs
        written: list[Tensor] = []
        if node.written:  # on copies: nothing that anybody else holds is written to
            args, kwargs = _copied(node.written, list(args), dict(kwargs), written)
        func = self.instead.get(node, IN_PLACE_OF.get(node.func, node.func))
        result = func(*args, **kwargs) if self._kind is None else _with_default(self._kind, func, args, kwargs)
        for value, tensor in zip(node.results, [*listed(result), *written], strict=False):
            if value is None:
                continue
            if value in self._given_values:
                continue
            if value in self._record.leaves:
                tensor = self._record.leaves[value]  # a leaf that the pass made: x.clone().requires_grad_()
            elif (hooks := self._record.hooks.get(value)) is not None and tensor.requires_grad:
                for hook in those_that_change(hooks):
                    tensor.register_hook(hook)
            self._tensors[value] = tensor

    def _filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple([self._filled_one(arg) for arg in args])

    def _filled_one(self, arg: Any) -> Any:
        if type(arg) is Value:
            return self[arg]
        return self._filled(arg) if type(arg) is tuple else arg


def _with_default(kind: torch.dtype, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """As in a step under precision="bf16-true" or "64-true", which the Trainer gives another default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        return func(*args, **kwargs)
    finally:
        torch.set_default_dtype(before)


def _copied(
    written: tuple[int | str, ...], args: list[Any], kwargs: dict[str, Any], copies: list[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for where in written:
        held: Any = kwargs if isinstance(where, str) else args
        if isinstance(where, int) and where >= len(args):
            continue
        arg = held.get(where) if isinstance(where, str) else held[where]
        if isinstance(arg, Tensor):
            held[where] = arg.clone()
            copies.append(held[where])
        elif isinstance(arg, tuple):
            held[where] = [t.clone() for t in arg]
            copies.extend(held[where])
    return tuple(args), kwargs


def ordered(record: Record, roots: Collection[Value]) -> list[Node]:
    """The operations that these values were computed by, in the order of the user's pass."""
    needed = ancestors(roots)
    return [node for node in record.nodes if node in needed]


def ancestors(roots: Collection[Value]) -> set[Node]:
    """The operations that these values were computed by."""
    needed: set[Node] = set()
    queue = [value.node for value in roots if value.node is not None]
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue.extend(value.node for value in node.values() if value.node is not None)
    return needed
