"""From recorded nodes to operations that can be carried out again at other states."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.traits import BATCH_NORMS, traits
from lightning_ebm.capture.values import CONSTANT, STATE, Node, Value
from lightning_ebm.capture.writing import Op, repeated_key

_aten = torch.ops.aten
_ALIASES = frozenset({"detach", "alias"})
_SAVED = _ALIASES | {"clone"}
"""How autograd saves tensors: what it puts aside depends on nothing but the operations it was put aside for."""


class NotRepeatable(Exception):  # not an error: the reason to do it the plain way
    """Why a record cannot be turned into code that gives the same at other states."""


class Lines:
    """From recorded nodes to operations: no writing, no aliases, nothing twice.

    Args:
        tape: the record.
        known: the values that the comparison with another first pass covers.
        first_pass: how many of the recorded operations belong to the first pass.
        defined: inputs that are the sum of two other values.
        still: inputs that are what the first pass had there, which is what it computed as these values.
    """

    def __init__(
        self,
        tape: Tape,
        known: Set[Value],
        first_pass: int,
        defined: Mapping[Value, tuple[Value, Value]],
        still: Mapping[Value, Value],
    ) -> None:
        self.bound: list[Value] = []
        self.nodes: set[Node] = set()
        self.fixed: dict[Value, Tensor] = {}
        self._tape = tape
        self._known = known
        self._early = {value for node in tape.nodes[:first_pass] for value in node.values()}
        self._first_pass = first_pass
        self._defined = defined
        self._instead: dict[Value, Value] = {}
        self._levels = _levels_with(tape, still)
        self._made: dict[Value, Op] = {}
        # Where nothing below has moved either, the state is the very prediction, and their difference is 0.
        self._same = {state: mu for state, mu in still.items() if self._level(mu) == CONSTANT}

    def _level(self, value: Value) -> int:
        return self._levels.get(value, value.level)

    def of(self, outputs: Sequence[Value]) -> list[Op]:
        """The operations that the outputs need, in order."""
        self._collect(outputs)
        done: dict[Any, Op] = {}
        ops: list[Op] = []
        self._instead.update({state: state.like() for state in self._defined})
        self._instead.update(self._same)
        pending = dict(self._defined)
        for node in sorted(self.nodes, key=lambda n: n.index):
            for state in [s for s in node.values() if s in pending]:
                self._define(state, pending, ops)
            op = self._op(node)
            if op is None:
                continue
            key = repeated_key(op.func, op.args, tuple(op.kwargs.items()))
            if key is not None and key in done:
                for old, new in zip(op.results, done[key].results, strict=True):
                    if old is not None and new is not None:
                        self._instead[old] = new
                continue
            if key is not None:
                done[key] = op
            ops.append(op)
            self._made.update({v: op for v in op.results if v is not None})
            self._levels.update(dict.fromkeys((v for v in op.results if v is not None), op.level))
        for state in [v for v in outputs if v in pending]:
            self._define(state, pending, ops)
        return ops

    def plain(self, value: Value) -> Value:
        """The value that stands for this one."""
        while value in self._instead:
            value = self._instead[value]
        return value

    def _define(self, state: Value, pending: dict[Value, tuple[Value, Value]], ops: list[Op]) -> None:
        prediction, error = pending.pop(state)
        total = self.plain(state)
        ops.append(Op(torch.add, (self.plain(prediction), self.plain(error)), {}, [total], True, STATE))

    def _collect(self, outputs: Sequence[Value]) -> None:
        queue, seen = list(outputs), set()
        while queue:
            value = queue.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self._defined:
                queue.extend(self._defined[value])
                continue
            if value in self._same:
                queue.append(self._same[value])
                continue
            node = value.node
            if node is None:
                if self._level(value) == CONSTANT:
                    self._bind(value)
                continue
            early, kind = node.index < self._first_pass, traits(node.func)
            saved = value not in self._known and kind.name in _SAVED
            if self._level(value) == CONSTANT and early and not kind.views and not saved:
                self._bind(value)
                continue
            if node not in self.nodes:
                self.nodes.add(node)
                if early and value not in self._known and not saved:
                    raise NotRepeatable(f"has gradients that need {node} besides what its loss and layers do")
                if node.problem is not None:
                    raise NotRepeatable(f"{node.func} {node.problem}")
                queue.extend(_kept(node))

    def _bind(self, value: Value) -> None:
        if value not in self._tape.contents:
            raise NotRepeatable("overwrites a tensor of the first pass that is used again")
        if value.node is None and value not in self._early:
            self.fixed[value] = self._tape.contents[value]
        elif value not in self._known:
            raise NotRepeatable(f"has gradients that need {value.node} besides what its loss and layers do")
        self.bound.append(value)

    def _op(self, node: Node) -> Op | None:
        kind = traits(node.func)
        args, kwargs = self._plain(node.args), self._plain(node.kwargs)
        results = list(node.results)
        func = node.func
        if kind.name in _ALIASES:
            self._instead[_first(node)] = args[0]
            return None
        if kind.name == "t" and (made := self._made.get(args[0])) is not None and made.func is func:
            self._instead[_first(node)] = made.args[0]
            return None
        if kind.name == "native_dropout" and node.level >= STATE:
            x, rate = args[0], args[1]
            out, mask = results
            assert out is not None
            if args[2] is False or rate == 0:
                self._instead[out] = x
                return None
            assert mask is not None
            func, args, results = _dropped, (x, mask, 0.0 if rate == 1 else 1 / (1 - rate)), [out]
        elif kind.name in BATCH_NORMS:
            # In training the running statistics are written and not read: at other states there is nothing to write.
            args = (*args[:3], None, None, *args[5:]) if args[5] else args
            results = results[:3]
        elif kind.name == "native_batch_norm_backward":
            args = (*args[:3], None, None, *args[5:]) if args[7] else args
        elif kind.writes:
            func = without_writing(node)
        returns = node.func._schema.returns
        single = func is _dropped or (len(returns) == 1 and not isinstance(returns[0].type, torch.ListType))
        op = Op(func, args, kwargs, results, single, CONSTANT)
        # Not the node's: what only needs the shape of something does not depend on it, but has to come after it.
        op.level = max(map(self._level, op.reads()), default=CONSTANT)
        return op

    def _plain(self, arg: Any) -> Any:
        if type(arg) is Value:
            return self.plain(arg)
        if type(arg) is tuple:
            return tuple(self._plain(a) for a in arg)
        if type(arg) is dict:
            return {name: self._plain(a) for name, a in arg.items()}
        return arg


def _levels_with(tape: Tape, still: Iterable[Value]) -> dict[Value, int]:
    """Levels that are lower than noted where some inputs are constants."""
    levels = dict.fromkeys(still, CONSTANT)
    for node in tape.nodes if levels else ():
        level = max((levels.get(value, value.level) for value in node.values()), default=CONSTANT)
        if level < node.level:
            levels.update((value, level) for value in node.results if value is not None and value.level > level)
    return levels


def _kept(node: Node) -> Iterable[Value]:
    """The values that an operation will still read once it is written as code."""
    kind = traits(node.func)
    drop: set[Any] = set()
    if (kind.name in BATCH_NORMS and node.args[5]) or (kind.name == "native_batch_norm_backward" and node.args[7]):
        drop = set(node.args[3:5])
    found = [v for v in node.values() if v not in drop]
    if kind.name == "native_dropout" and node.level >= STATE and node.results[1] is not None:
        found.append(node.results[1])
    return found


def _dropped(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask * scale


def without_writing(node: Node) -> Callable[..., Any]:
    """The same operation with a result of its own."""
    name = traits(node.func).name
    packet = getattr(_aten, name.removesuffix("_"), None)
    overload = node.func._overloadname
    if not name.endswith("_") or packet is None or overload not in packet.overloads() or len(node.results) != 1:
        raise NotRepeatable(f"{node.func} writes to a tensor that depends on states")
    return getattr(packet, overload)  # type: ignore[no-any-return]


def _first(node: Node) -> Value:
    value = node.results[0]
    assert value is not None
    return value
