"""Part of a record as straight-line code: what depends on the batch alone is computed once, the rest at every point.

Stages, by what a value depends on: `once` a batch (transposed weights; whatever the first pass has computed already is
taken from there), once a `phase` (multiples of the nudge), at every `point` the relaxer asks for, and in the `update`,
which is the only one to compute gradients of parameters. The last sums of the `energy` wait until somebody asks.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.tape import BATCH_NORMS, CONSTANT, PHASE, SEED, STATE, Node, Tape, Value, traits

_aten = torch.ops.aten
_ALIASES = frozenset({"detach", "alias"})
_ENERGY = SEED + 1
"""The stage that finishes the energy."""
_SAVED = _ALIASES | {"clone"}
"""How autograd saves tensors: what it puts aside depends on nothing but the operations it was put aside for."""


class NotRepeatable(Exception):  # not an error: the reason to do it the plain way
    """Why a record cannot be turned into code that gives the same at other states."""


@dataclass
class Op:
    """One operation to carry out. Results that nobody needs are None."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Value | None]
    single: bool
    level: int

    def reads(self) -> set[Value]:
        """The values among the arguments."""
        return set(_values_in((self.args, tuple(self.kwargs.values()))))


Rewrite = Callable[[Sequence[Op], Iterable[Value]], list[Op]]
"""From the operations of a stage, and the values that must still be computed, to faster operations."""


@dataclass
class Program:
    """Code for one kind of evaluation.

    Attributes:
        bound: the values to be taken from the first pass.
        once: from the bound values to the rest of what a batch fixes.
        phase: from these and the nudge to what a phase fixes.
        point: from these and the point to the outputs, what the update wants kept, and what the energy is made of.
        energy: from that to the energy of each sample, for the points that are asked for it.
        update: from all of these and a scale to the gradients of the parameters.
        fixed: bound values that do not come from the pass: tensors of the energy itself.
    """

    bound: list[Value]
    once: Callable[..., tuple[Any, ...]]
    phase: Callable[..., tuple[Any, ...]]
    point: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]]
    energy: Callable[..., tuple[Any, ...]]
    update: Callable[..., tuple[Any, ...]]
    fixed: dict[Value, Tensor]
    sources: dict[str, str] = field(default_factory=dict)

    def finish(self, parts: Sequence[Tensor]) -> Tensor:
        """`energy`, for `Forces`."""
        (found,) = self.energy(parts)
        return found  # type: ignore[no-any-return]


def compiled_program(
    point: Sequence[Value],
    strength: Value,
    scale: Value,
    energy: Value,
    outputs: Sequence[Value],
    slopes: Sequence[Value],
    tape: Tape,
    known: Set[Value],
    first_pass: int,
    defined: Mapping[Value, tuple[Value, Value]],
    rewrite: Rewrite | None = None,
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Program:
    """Sorts what the outputs depend on into stages, and writes the code.

    Args:
        point: the inputs that move: states, or errors.
        strength: the nudge, an input.
        scale: what the gradients of parameters are multiplied by, an input.
        energy: of each sample.
        outputs: what every evaluation gives besides.
        slopes: what the update gives.
        tape: the record.
        known: the values that the comparison with another first pass covers.
        first_pass: how many of the recorded operations belong to the first pass.
        defined: inputs that are the sum of two other values: states, in error coordinates.
        rewrite: makes faster operations of those of a stage.
        compiler: makes faster code of the code of a point.

    Raises:
        NotRepeatable: an operation cannot be repeated at other states.
    """
    lines = _Lines(tape, known, first_pass, defined)
    ops = lines.of([energy, *outputs, *slopes])
    slopes = [lines.plain(v) for v in slopes]
    energy, *outputs = _owned(ops, [lines.plain(v) for v in (energy, *outputs)])
    at_points, at_all = _needed(ops, {energy, *outputs}), _needed(ops, {*outputs, *slopes})
    stages: list[list[Op]] = [[] for _ in range(5)]
    late: set[Value] = set()  # from here on the energy is cheaper to finish than it is to hold
    for op in ops:
        held = [v for v in op.reads() if v not in late]
        if op.level < STATE or id(op) not in at_points:
            stages[op.level if op.level < STATE else SEED].append(op)
        elif id(op) not in at_all and all(math.prod(v.shape) <= math.prod(energy.shape) for v in held):
            stages[_ENERGY].append(op)
            late |= {v for v in op.results if v is not None}
        else:
            stages[STATE].append(op)
    inputs: list[list[Value]] = [lines.bound, [strength], list(point), [scale], []]
    used = [set().union(*(op.reads() for op in stage)) for stage in stages]
    used[STATE] |= set(outputs)
    used[SEED] |= set(slopes)
    used[_ENERGY].add(energy)

    def handed(level: int, *later: int) -> list[Value]:
        """What a stage makes and later ones use, in the order in which it is made."""
        wanted = set().union(*(used[k] for k in later))
        order = [*inputs[level], *(v for op in stages[level] for v in op.results if v is not None)]
        return [v for v in order if v in wanted]

    parts = [v for level in (CONSTANT, PHASE, STATE) for v in handed(level, _ENERGY)]
    used[STATE] |= set(parts)
    once, phase, kept = handed(CONSTANT, PHASE, STATE, SEED), handed(PHASE, STATE, SEED), handed(STATE, SEED)
    names = _Names()
    sources: dict[str, str] = {}

    def code(name: str, level: int, arguments: list[list[Value]], results: list[list[Value]]) -> Callable[..., Any]:
        stage = stages[level] if rewrite is None else rewrite(stages[level], {v for r in results for v in r})
        sources[name] = _source(name, stage, arguments, results, names)
        space = dict(names.constants)
        exec(compile(sources[name], f"<lightning_ebm {name}>", "exec"), space)
        function: Callable[..., Any] = space[name]
        return function

    evaluate = code("point", STATE, [once, phase, list(point)], [outputs, kept, parts])
    return Program(
        bound=lines.bound,
        once=code("once", CONSTANT, [lines.bound], [once]),
        phase=code("phase", PHASE, [once, [strength]], [phase]),
        point=evaluate if compiler is None else compiler(evaluate),
        energy=code("energy", _ENERGY, [parts], [[energy]]),
        update=code("update", SEED, [once, phase, kept, [scale]], [slopes]),
        fixed=lines.fixed,
        sources=sources,
    )


class _Lines:
    """From recorded nodes to operations: no writing, no aliases, nothing twice."""

    def __init__(
        self, tape: Tape, known: Set[Value], first_pass: int, defined: Mapping[Value, tuple[Value, Value]]
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
        self._levels: dict[Value, int] = {}
        self._made: dict[Value, Op] = {}

    def of(self, outputs: Sequence[Value]) -> list[Op]:
        """The operations that the outputs need, in order."""
        self._collect(outputs)
        done: dict[Any, Op] = {}
        ops: list[Op] = []
        self._instead.update({state: _like(state) for state in self._defined})
        pending = dict(self._defined)
        for node in sorted(self.nodes, key=lambda n: n.index):
            for state in [s for s in node.values() if s in pending]:
                self._define(state, pending, ops)
            op = self._op(node)
            if op is None:
                continue
            key = _key(op)
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
            node = value.node
            if node is None:
                if value.level == CONSTANT:
                    self._bind(value)
                continue
            early, kind = node.index < self._first_pass, traits(node.func)
            saved = value not in self._known and kind.name in _SAVED
            if value.level == CONSTANT and early and not kind.views and not saved:
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
            func = _without_writing(node)
        returns = node.func._schema.returns
        single = func is _dropped or (len(returns) == 1 and not isinstance(returns[0].type, torch.ListType))
        op = Op(func, args, kwargs, results, single, CONSTANT)
        # Not the node's: what only needs the shape of something does not depend on it, but has to come after it.
        op.level = max((self._levels.get(v, v.level) for v in op.reads()), default=CONSTANT)
        return op

    def _plain(self, arg: Any) -> Any:
        if type(arg) is Value:
            return self.plain(arg)
        if type(arg) is tuple:
            return tuple(self._plain(a) for a in arg)
        if type(arg) is dict:
            return {name: self._plain(a) for name, a in arg.items()}
        return arg


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


def _without_writing(node: Node) -> Callable[..., Any]:
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


def _like(value: Value) -> Value:
    """Another one, of the states, for a tensor of the same shape."""
    other = Value(None, STATE)
    other.shape = value.shape
    return other


def _owned(ops: list[Op], outputs: Sequence[Value]) -> list[Value]:
    """Outputs that whoever asked for them may write to: not shared between points, or with each other."""
    made = {v for op in ops if op.level >= STATE for v in op.results}
    owned: list[Value] = []
    for value in outputs:
        if value not in made or value in owned:
            copy = _like(value)
            ops.append(Op(torch.clone, (value,), {}, [copy], True, STATE))
            value = copy
        owned.append(value)
    return owned


def _key(op: Op) -> Any:
    try:
        key = (op.func, op.args, tuple(op.kwargs.items()), _types(op.args))
        hash(key)
    except TypeError:
        return None
    return key


def _types(arg: Any) -> Any:
    """1, 1.0 and True are equal and not the same."""
    return tuple(_types(a) for a in arg) if type(arg) is tuple else type(arg)


def _needed(ops: Sequence[Op], outputs: set[Value]) -> set[int]:
    """Which operations the outputs need."""
    wanted, found = set(outputs), set()
    for op in reversed(ops):
        if any(v in wanted for v in op.results if v is not None):
            found.add(id(op))
            wanted |= op.reads()
    return found


class _Names:
    """Names of values and constants in the code."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {"inf": math.inf, "nan": math.nan}
        self._of: dict[Any, str] = {}
        self._count = itertools.count()

    def of(self, value: Value) -> str:
        if value not in self._of:
            self._of[value] = f"v{next(self._count)}"
        return self._of[value]

    def constant(self, thing: Any) -> str:
        if thing is None or type(thing) in (bool, int, float, str):
            return repr(thing)
        key = (id(thing), "constant")
        if key not in self._of:
            self._of[key] = f"c{next(self._count)}"
            self.constants[self._of[key]] = thing
        return self._of[key]

    def written(self, arg: Any) -> str:
        if type(arg) is Value:
            return self.of(arg)
        if type(arg) is tuple:
            return f"[{', '.join(self.written(a) for a in arg)}]"
        return self.constant(arg)


def _source(
    name: str, ops: Sequence[Op], arguments: list[list[Value]], results: list[list[Value]], names: _Names
) -> str:
    """A function of tuples that returns tuples; what is not needed any more is let go as soon as it is not."""
    parameters = [f"a{k}" for k in range(len(arguments))]
    lines = [f"def {name}({', '.join(parameters)}):"]
    inside = {v for op in ops for v in (*op.reads(), *op.results) if v is not None} | {v for r in results for v in r}
    for parameter, values in zip(parameters, arguments, strict=True):
        if values:
            lines.append(f"({', '.join(names.of(v) if v in inside else '_' for v in values)},) = {parameter}")
    own = {v for op in ops for v in op.results if v is not None}
    last: dict[Value, int] = {}
    for index, op in enumerate(ops):
        last.update(dict.fromkeys(op.reads() & own, index))
    kept = {v for r in results for v in r}
    for index, op in enumerate(ops):
        written = [names.written(a) for a in op.args] + [f"{k}={names.written(a)}" for k, a in op.kwargs.items()]
        targets = [names.of(v) if v is not None and (v in kept or v in last) else "_" for v in op.results]
        left = targets[0] if op.single else f"{', '.join(targets)}, *_"
        lines.append(f"{left} = {names.constant(fastest(op.func))}({', '.join(written)})")
        dead = [names.of(v) for v in op.reads() if last.get(v) == index and v not in kept]
        if dead:
            lines.append(f"del {', '.join(dead)}")
    tuples = [f"({', '.join(names.of(v) for v in r)}{',' if r else ''})" for r in results]
    lines.append(f"return {tuples[0] if len(tuples) == 1 else ', '.join(tuples)}")
    return "\n    ".join(lines) + "\n"


_DIRECT = {
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "mm", "addmm", "tanh", "relu", "neg", "sigmoid",
}  # fmt: skip


def fastest(func: Any) -> Callable[..., Any]:
    """The same function by the shorter way through Python, where there is one."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.name.startswith("aten::"):
        return func  # type: ignore[no-any-return]
    name = schema.name.removeprefix("aten::")
    full = f"{name}.{schema.overload_name}" if schema.overload_name else name
    return getattr(torch, name) if full in _DIRECT else func  # type: ignore[no-any-return]


def _values_in(arg: Any) -> Iterable[Value]:
    if type(arg) is Value:
        yield arg
    elif type(arg) is tuple:
        for a in arg:
            yield from _values_in(a)
