"""A second pass over the same batch does not multiply again what the first has multiplied."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.traits import traits
from lightning_ebm.capture.values import CONSTANT, Node, Value
from lightning_ebm.capture.writing import repeated_key

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.convolution.default})


class Remembered(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, matrix products of the batch and the parameters alone are copied from a record of an earlier pass.

    An operation on the very tensors of before, or on what the same operations made of them, has the result of before.
    That ends with the first operation that writes to one of these tensors, and never begins for random numbers.

    Args:
        tape: the record of a pass that started from the same state of the module and the generators.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape: Tape | None = None if tape.problem is not None else tape
        self._nodes: dict[Any, Node] = {}
        self._of: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        for node in tape.nodes if self._tape is not None else []:
            kind = traits(node.func)
            plain = node.level == CONSTANT and not (node.kwargs or kind.random or kind.writes)
            if plain and (key := repeated_key(node.func, node.args)) is not None:
                self._nodes[key] = node
        for value, tensor in tape.outside.items():
            self._of[id(tensor)] = weakref.ref(tensor), value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node = self._node(func, args, kwargs) if self._tape is not None else None
        if node is not None and self._tape is not None and func in _PRODUCTS:
            content = self._tape.contents.get(node.results[0])  # type: ignore[arg-type]
            if content is not None:
                return self._noted(content.clone(), node.results[0])
        result = func(*args, **kwargs)
        if node is not None and len(node.results) == 1 and isinstance(result, Tensor):
            self._noted(result, node.results[0])
        return result

    def _node(self, func: Any, args: Any, kwargs: Any) -> Node | None:
        """The recorded operation that this one repeats."""
        found = tuple(self._value(arg) for arg in args)
        if traits(func).writes and any(type(arg) is Value for arg in found):
            self._tape = None
        if kwargs or self._tape is None or not any(type(arg) is Value for arg in found):
            return None
        key = repeated_key(func, found)
        return None if key is None else self._nodes.get(key)

    def _value(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            known = self._of.get(id(arg))
            return known[1] if known is not None and known[0]() is arg else _UNKNOWN
        return tuple(self._value(a) for a in arg) if isinstance(arg, list | tuple) else arg

    def _noted(self, tensor: Tensor, value: Value | None) -> Tensor:
        if value is not None:
            self._of[id(tensor)] = weakref.ref(tensor), value
        return tensor


_UNKNOWN = object()
