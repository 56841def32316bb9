"""A record of every tensor operation of one pass, in which two passes can be compared for being the same computation.

The record is taken below autograd, where each operation is a plain function of tensors and constants: so it holds
whatever Python did to get there (a weight that depends on the epoch, a branch on a flag, a number read off the batch)
as the constants and the sequence it led to. Two passes whose records match compute the same function of their inputs;
nothing else about the user's code has to be known.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ebm.substitution import StateKey, StateOf

CONSTANT, PHASE, STATE, SEED = range(4)
"""What a value depends on: batch and parameters alone; the nudge as well; the states; the scale of the update."""


class Value:
    """What one tensor holds at one moment: writing to the tensor makes another value. Values themselves hold no data.

    Attributes:
        node: what computed it; None for an input and for a tensor that came from outside.
        level: what it depends on.
        meta: what makes two tensors from outside interchangeable; None for all others.
        read: whether an operation has used it.
        stale: whether its memory was written to under another name.
    """

    __slots__ = ("level", "meta", "node", "read", "stale")

    def __init__(self, node: "Node | None", level: int, outside: Tensor | None = None) -> None:
        self.node = node
        self.level = level
        self.meta = None if outside is None else _meta(outside)
        self.read = self.stale = False


class Node:
    """One operation; tensors among its arguments are values. `problem` says why it cannot be repeated elsewhere."""

    __slots__ = ("args", "func", "grad", "index", "kwargs", "level", "problem", "results")

    def __init__(self, func: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.index = index
        self.args = args
        self.kwargs = kwargs
        self.grad = torch.is_grad_enabled()
        self.level = CONSTANT
        self.problem: str | None = None
        self.results: list[Value | None] = []

    def values(self) -> Iterator[Value]:
        """The values it reads."""
        yield from _values(self.args)
        if self.kwargs:
            yield from _values(tuple(self.kwargs.values()))


class Traits(NamedTuple):
    """What a kind of operation does to tensors.

    Attributes:
        name: without namespace and overload.
        writes: positions or names of the arguments that it writes to.
        overwrites: whether what was there before is of no consequence.
        views: whether its results share memory with its arguments.
        by_shape: whether only the shape of its arguments matters.
        random: whether it draws from a generator.
        dynamic: whether the shape of its result depends on values.
    """

    name: str
    writes: tuple[int | str, ...]
    overwrites: bool
    views: bool
    by_shape: bool
    random: bool
    dynamic: bool


BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"})
"""They write to arguments 3 and 4, the running statistics, while argument 5 says training; not all schemas tell."""
_OVERWRITING = frozenset(
    {"bernoulli_", "uniform_", "normal_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
    | {"fill_", "zero_", "copy_"}
)
_BY_SHAPE = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
    | {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
)
_LIFTED = frozenset({"lift_fresh", "lift", "lift_fresh_copy"})


@cache
def traits(func: Any) -> Traits:
    """What a kind of operation does to tensors, from its schema."""
    schema = func._schema
    name = schema.name.split("::")[1]
    writes = tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return Traits(
        name=name,
        writes=(3, 4) if name in BATCH_NORMS else writes,
        overwrites=name in _OVERWRITING,
        views=views,
        by_shape=name in _BY_SHAPE,
        random=torch.Tag.nondeterministic_seeded in func.tags,
        dynamic=torch.Tag.dynamic_output_shape in func.tags,
    )


class Tape(TorchDispatchMode):
    """Records while it is active as a context manager; it may be entered several times.

    A record that fails never disturbs the pass: `problem` says why it is of no use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.problem: str | None = None
        self.reads: list[str] = []
        """Operations that turned something computed from states into a Python number."""
        self.contents: dict[Value, Tensor] = {}
        """What values can be read from when the pass is over."""
        self.outside: dict[Value, Tensor] = {}
        """The tensors that came from outside."""
        self._known: dict[int, tuple[Callable[[], Tensor | None], Value]] = {}
        self._sharing: dict[int, list[Value]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node: Node | None = None
        if self.problem is None:
            try:
                node, written = self._begun(func, args, kwargs)
            except Exception as error:
                self.problem = f"{func}: {error}"
        result = func(*args, **kwargs)
        if node is not None:
            try:
                self._ended(node, written, result)
            except Exception as error:
                self.problem = f"{func}: {error}"
        return result

    def input(self, tensor: Tensor, level: int) -> Value:
        """Makes a tensor an input of what is computed from it from now on."""
        return self._put(tensor, Value(None, level))

    def cutting(self, state_of: StateOf) -> StateOf:
        """The same choice of states, each noted as an input."""

        def cut(key: StateKey, prediction: Tensor) -> Tensor | None:
            state = state_of(key, prediction)
            if state is not None:
                self.input(state, STATE)
            return state

        return cut

    def value(self, tensor: Tensor) -> Value:
        """What a tensor holds now."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            self.problem = f"a tensor of class {type(tensor).__name__}"
        return self._from_outside(tensor)

    def _begun(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Node, list[Tensor]]:
        seen = tuple([self._seen(a) for a in args])
        node = Node(func, len(self.nodes), seen, {name: self._seen(a) for name, a in kwargs.items()} if kwargs else {})
        kind = traits(func)
        written = _tensors_at(kind, args, kwargs) if kind.writes else []
        before = [self.value(tensor) for tensor in written]
        for value in node.values():
            if not (kind.by_shape or (kind.overwrites and value in before)):
                node.level = max(node.level, value.level)
            if value.stale:
                node.problem = "reads memory that was written to through another view of it"
        for value in before:
            content = self.contents.pop(value, None)
            if content is not None and value.read and value.level == CONSTANT:
                self.contents[value] = content.clone()
        for value in node.values():
            value.read = True
        if node.level >= STATE and kind.random and not _draws_nothing(node, kind):
            node.problem = "draws random numbers in a way that depends on states"
        if node.level >= STATE and kind.dynamic:
            node.problem = "has a result whose shape depends on states"
        return node, written

    def _ended(self, node: Node, written: list[Tensor], result: Any) -> None:
        kind = traits(node.func)
        results = result if isinstance(result, list | tuple) else (result,)
        for part, tensor in enumerate(results):
            if not isinstance(tensor, Tensor):
                node.results.append(None)
                if tensor is not None and node.level >= STATE:
                    self.reads.append(str(node.func))
                continue
            if kind.name in _LIFTED:  # made of Python numbers: another one in every pass
                node.results.append(self._from_outside(tensor))
                continue
            mask = kind.name == "native_dropout" and part == 1
            value = self._put(tensor, Value(node, CONSTANT if mask else node.level))
            node.results.append(value)
            if not kind.views:  # those must not be held: autograd would then hand out a copy of it, unknown here
                self.contents[value] = tensor.detach() if kind.writes else tensor
        if kind.views:
            for tensor, value in zip(results, node.results, strict=True):
                if value is not None:
                    group = self._sharing.setdefault(tensor.untyped_storage().data_ptr(), [])
                    group.extend((value, *node.values()))
        for tensor in written:
            now = self.value(tensor)
            if now.node is not node:
                now = self._put(tensor, Value(node, node.level))
                self.contents[now] = tensor.detach()
                node.results.append(now)
            for other in self._sharing.get(tensor.untyped_storage().data_ptr(), ()):
                if other is not now:
                    other.stale = True
                    self.contents.pop(other, None)
        self.nodes.append(node)

    def _from_outside(self, tensor: Tensor) -> Value:
        value = self._put(tensor, Value(None, CONSTANT, tensor))
        self.outside[value] = tensor
        # An alias: whoever gives a parameter other storage afterwards does not change what was read here.
        self.contents[value] = tensor.detach()
        return value

    def _put(self, tensor: Tensor, value: Value) -> Value:
        self._known[id(tensor)] = weakref.ref(tensor), value
        return value

    def _seen(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.value(arg)
        if isinstance(arg, list | tuple):
            return tuple([self._seen(a) for a in arg])
        return arg


def same_computation(
    expected: Iterable[Node], nodes: Iterable[Node], known: dict[Value, Value]
) -> dict[Value, Value] | str:
    """Finds the expected operations, in order and with the same constants, among those of another record.

    Operations in between that none of the expected ones depends on (those of metrics and logging) may differ.

    Args:
        expected: operations of the earlier record.
        nodes: all operations of the new one.
        known: inputs of the new record, and the inputs of the earlier one they correspond to.

    Returns:
        The value of the new record for each of the earlier one; or what was not found.
    """
    there: dict[Value, Value] = dict(known)
    here: dict[Value, Value] = {old: new for new, old in known.items()}
    wanted = iter(expected)
    want = next(wanted, None)
    for node in nodes:
        if want is None:
            break
        if node.func is not want.func or node.grad is not want.grad or node.problem != want.problem:
            continue
        fresh: dict[Value, Value] = {}
        if _same(want.args, node.args, there, here, fresh) and _same(
            tuple(want.kwargs.items()), tuple(node.kwargs.items()), there, here, fresh
        ):
            for old, new in [*fresh.items(), *zip(want.results, node.results, strict=True)]:
                if old is not None and new is not None:
                    there[new], here[old] = old, new
            want = next(wanted, None)
    return here if want is None else f"{want.func}({', '.join(str(a) for a in want.args if type(a) is not Value)})"


def _same(old: Any, new: Any, there: dict[Value, Value], here: dict[Value, Value], fresh: dict[Value, Value]) -> bool:
    if type(old) is not type(new):
        return False
    if type(old) is tuple:
        return len(old) == len(new) and all(_same(o, n, there, here, fresh) for o, n in zip(old, new, strict=True))
    if type(old) is not Value:
        return bool(old == new) or (old != old and new != new)
    if (known := there.get(new)) is not None:
        return known is old
    if old in fresh:
        return fresh[old] is new
    if old.meta is None or old.meta != new.meta or old in here or new in fresh.values():
        return False
    fresh[old] = new
    return True


def ancestors(values: Iterable[Value]) -> set[Node]:
    """Every operation that the values were computed by."""
    found: set[Node] = set()
    queue = [value.node for value in values]
    while queue:
        node = queue.pop()
        if node is not None and node not in found:
            found.add(node)
            queue.extend(value.node for value in node.values())
    return found


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _draws_nothing(node: Node, kind: Traits) -> bool:
    """Whether a kind that can draw does not, or draws what is known to be a mask of its own."""
    if kind.name == "native_dropout":
        return True
    names = [argument.name for argument in node.func._schema.arguments]
    if "dropout_p" not in names:
        return False
    position = names.index("dropout_p")
    given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return bool(given == 0)


def _tensors_at(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if kind.name in BATCH_NORMS and not args[5]:
        return []
    found: list[Tensor] = []
    for where in kind.writes:
        arg = kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None
        found.extend(t for t in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(t, Tensor))
    return found


def _values(args: tuple[Any, ...]) -> Iterator[Value]:
    for arg in args:
        if type(arg) is Value:
            yield arg
        elif type(arg) is tuple:
            yield from _values(arg)
