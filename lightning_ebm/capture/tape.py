"""A record of every tensor operation of one pass, in which two passes can be compared for being the same computation.

The record is taken below autograd, where each operation is a plain function of tensors and constants: so it holds
whatever Python did to get there (a weight that depends on the epoch, a branch on a flag, a number read off the batch)
as the constants and the sequence it led to. Two passes whose records match compute the same function of their inputs;
nothing else about the user's code has to be known.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ebm.capture.places import Place, apart, place_of
from lightning_ebm.capture.traits import BATCH_NORMS, Traits, traits
from lightning_ebm.capture.values import CONSTANT, STATE, Node, Value, values_in
from lightning_ebm.substitution import StateKey, StateOf

_NLL = frozenset({"nll_loss_forward", "nll_loss2d_forward"})
_LIFTED = frozenset({"lift_fresh", "lift", "lift_fresh_copy"})


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records while it is active as a context manager; it may be entered several times.

    A record that fails never disturbs the pass: `problem` says why it is of no use.

    Args:
        faster: other ways to the results of some operations, by their id, equal to theirs up to rounding; each may
            decline.
    """

    def __init__(self, faster: Mapping[int, Callable[..., Tensor | None]] = MappingProxyType({})) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._faster = faster
        self.nodes: list[Node] = []
        self.problem: str | None = None
        self.reads: list[str] = []
        """Operations that turned something computed from states into a Python number."""
        self.contents: dict[Value, Tensor] = {}
        """What values can be read from when the pass is over."""
        self.keeps = True
        """Whether what operations on states give is to be among them."""
        self.outside: dict[Value, Tensor] = {}
        """The tensors that came from outside."""
        self._known: dict[int, tuple[Callable[[], Tensor | None], Value]] = {}
        self._shared: list[tuple[Value, weakref.ref[Tensor]]] = []
        """Tensors that share memory with others, as far as nobody has asked yet where it is."""
        self._sharing: dict[int, list[tuple[Value, Place, weakref.ref[Tensor]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        node: Node | None = None
        if self.problem is None:
            try:
                node, written = self._begun(func, args, kwargs)
            except Exception as error:
                self.problem = f"{func}: {error}"
        faster = self._faster.get(id(func))
        result = None if faster is None else faster(*args, **kwargs)
        if result is None:
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

    def known_as(self, tensor: Tensor, value: Value) -> Tensor:
        """Notes that a tensor holds a value, though another one did when it was recorded."""
        self._put(tensor, value)
        return tensor

    def thin_out(self) -> None:
        """Lets go of what was only on the way from states to what is known too, unless its graph needs it.

        That is what activations are given, mostly: each as large as a state.
        """
        readers: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.values():
                readers.setdefault(value, []).append(node)
        for value in reversed(list(self.contents)):
            after = [result for node in readers.get(value, ()) for result in node.results]
            if (
                value.level >= STATE
                and value.node is not None
                and after
                and all(result in self.contents for result in after)
            ):
                others = weakref.ref(self.contents.pop(value))
                if (tensor := others()) is not None:
                    self.contents[value] = tensor

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
        # Once for every operation of every batch, on the way to what is fast: hence one walk, and few calls.
        kind = traits(func)
        values: list[Value] = []
        seen = self._seen(args, values)
        named = dict(zip(kwargs, self._seen(kwargs.values(), values), strict=True)) if kwargs else kwargs
        node = Node(func, len(self.nodes), seen, named)
        written: list[Tensor] = []
        before: list[Value] = []
        if kind.writes:
            written = _tensors_at(kind, args, kwargs)
            before = [self.value(tensor) for tensor in written]
        if kind.shares:
            for arg in (*args, *kwargs.values()):
                if isinstance(arg, Tensor):
                    self._shared.append((self.value(arg), weakref.ref(arg)))
        for value in values:
            if value.level > node.level and not (kind.by_shape or (kind.overwrites and value in before)):
                node.level = value.level
            if value.stale:
                node.problem = "reads memory that was written to through another view of it"
        for value in before:
            content = self.contents.pop(value, None)
            if content is not None and value.read and value.level == CONSTANT:
                self.contents[value] = content.clone()
        for value in values:
            value.read = True
        if node.level >= STATE:
            if kind.random and not _draws_nothing(node, kind):
                node.problem = "draws random numbers in a way that depends on states"
            if kind.dynamic and not (kind.name == "index" and _is_constant(node.args[1])):
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
            value = self._put(tensor, Value(node, CONSTANT if _is_fixed(node, kind, part) else node.level))
            node.results.append(value)
            # Views must not be held: autograd would then hand out a copy, unknown here.
            if not kind.views and (self.keeps or value.level == CONSTANT):
                self.contents[value] = tensor.detach() if kind.writes else tensor
        if kind.shares:
            for tensor, shared in zip(results, node.results, strict=True):
                if shared is not None:
                    self._shared.append((shared, weakref.ref(tensor)))
        for tensor in written:
            now = self.value(tensor)
            if now.node is not node:
                now = self._put(tensor, Value(node, node.level))
                self.contents[now] = tensor.detach()
                node.results.append(now)
            self._written_under_other_names(node, tensor)
        self.nodes.append(node)

    def _sort_shared(self) -> None:
        """Notes where tensors are that have come to share memory since this was last asked."""
        for value, ref in self._shared:
            tensor = ref()
            held = self.contents.get(value) if tensor is None else tensor
            if held is not None:  # else nobody can read it any more
                group = self._sharing.setdefault(held.untyped_storage().data_ptr(), [])
                group.append((value, place_of(held), ref))
        self._shared.clear()

    def _written_under_other_names(self, node: Node, tensor: Tensor) -> None:
        self._sort_shared()
        group = self._sharing.get(tensor.untyped_storage().data_ptr(), [])
        here = place_of(tensor)
        for other, place, ref in tuple(group):
            alias = ref()
            if alias is tensor or other.stale or apart(place, here):
                continue
            other.stale = True
            self.contents.pop(other, None)
            if node.level == other.level == CONSTANT and alias is not None and self.value(alias) is other:
                again = self._put(alias, Value(node, CONSTANT))
                self.contents[again] = alias.detach()
                node.results.append(again)
                self._shared.append((again, weakref.ref(alias)))

    def _from_outside(self, tensor: Tensor) -> Value:
        value = self._put(tensor, Value(None, CONSTANT, tensor))
        self.outside[value] = tensor
        # An alias: whoever gives a parameter other storage afterwards does not change what was read here.
        self.contents[value] = tensor.detach()
        return value

    def _put(self, tensor: Tensor, value: Value) -> Value:
        self._known[id(tensor)] = weakref.ref(tensor), value
        value.shape, value.dtype = tensor.shape, tensor.dtype
        return value

    def _seen(self, args: Iterable[Any], values: list[Value]) -> tuple[Any, ...]:
        """The arguments with values in the place of tensors, which are noted as well."""
        seen: list[Any] = []
        for arg in args:
            if isinstance(arg, Tensor):
                known = self._known.get(id(arg))
                value = known[1] if known is not None and known[0]() is arg else self.value(arg)
                values.append(value)
                seen.append(value)
            elif isinstance(arg, list | tuple):
                seen.append(self._seen(arg, values))
            else:
                seen.append(arg)
        return tuple(seen)


def _is_fixed(node: Node, kind: Traits, part: int) -> bool:
    """Whether a result does not depend on states where others do: a mask, or the weight of all targets together."""
    if part != 1:
        return False
    return kind.name == "native_dropout" or (kind.name in _NLL and _is_constant(node.args[1:3]))


def _is_constant(arg: Any) -> bool:
    return all(value.level == CONSTANT for value in values_in(arg))


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
