"""Recording one pass of the user's code, below autograd, without changing what it computes.

The pass runs uncut: no value is replaced, so whatever the user's own code differentiates is right. Each tensor
operation made while gradients are on becomes a `Node`. What is computed while they are off, and what the user
detaches, is a constant of the record, as are random draws and the numbers that Python reads off tensors: the record is
of the program that ran.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.at_value import written_unseen
from lightning_ebm.program.before import Before
from lightning_ebm.program.contents import Contents
from lightning_ebm.program.dispatch import DispatchMode
from lightning_ebm.program.following import Follower, Trail, same_results
from lightning_ebm.program.numbers import hold
from lightning_ebm.program.operations import (
    BATCH_NORMS,
    BY_MASK,
    PUT_BY_MASK,
    Traits,
    copied,
    functional_form,
    overwritten,
    tensors_at,
    traits,
    without_statistics,
)
from lightning_ebm.program.pause import Pause
from lightning_ebm.program.random_draws import draws, repeated_without_drawing
from lightning_ebm.program.record import (
    Mark,
    Node,
    Record,
    StateKey,
    Value,
    is_continuous,
    meta_of,
    outside_meta_of,
    stands_for,
)
from lightning_ebm.program.seams import seams
from lightning_ebm.program.torch_calls import TorchCalls

TakesCare = Callable[[Tensor, dict[str, Any]], bool]
"""Told of a `backward` call, by the tensor and its options; answers whether it has done what the call was to do."""

_SLOPED = BY_MASK | {"_ctc_loss"}
"""Operations that have a slope, though the shape of what they give depends on values."""
_COLLECTIVE = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
_DETACH = torch.ops.aten.detach.default


class Recorder(DispatchMode):
    """Records while it is active as a context manager; it may be entered several times.

    Args:
        undoes: note what tensors that were there before hold before they are written to, so that `undo` can put it
            back; or of which tensors alone.
    """

    def __init__(self, undoes: bool | Iterable[Tensor] = False) -> None:
        super().__init__()
        self.record = Record()
        self.pausing = Pause()
        """Within it nothing is recorded."""
        self.asked = False
        """Whether the user asked for the detached tensor that is about to be made; else autograd did, to save it."""
        self.on_backward: TakesCare | None = None
        """Told of every `Tensor.backward` that is called while this records."""
        self.contents = Contents(self.record, Before(undoes), self.pausing)
        self._follower: Follower | None = None
        self._drawn: set[Value] = set()
        """What was drawn while a known pass is followed, and nothing has read yet."""
        self._entered: list[Any] = []

    # What is recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.pausing.depth:
            return func(*args, **kwargs)
        if func is _DETACH and not self.asked:  # autograd's own, of a tensor that it saves: the same value
            return self.contents.aliased(func(*args), args[0])
        kind = traits(func)
        if kind.plain and self._follower is not None and torch.is_grad_enabled():
            node = self._followed(func, args, kwargs)
            if node is not None:
                result = func(*args, **kwargs)
                self._ended_again(node, kind, result)
                return result
        written = tensors_at(kind, args, kwargs) if kind.writes else []
        repeated = None
        off = not torch.is_grad_enabled() or func is _DETACH or (kind.dynamic and kind.name not in _SLOPED)
        off = off or self.contents.unseen_by_autograd(written)
        if kind.random and not off and draws(func, args, kwargs):
            repeated = repeated_without_drawing(kind, args)
            off = repeated is None
        if not off and func.namespace in _COLLECTIVE:
            if any(tensor.requires_grad for tensor in _tensors((args, kwargs))):
                raise _collective(str(func))
            off = True
        if off and (unseen := self._unseen(func, kind, args, kwargs, written)) is not None:
            return unseen
        if off:
            self.contents.about_to_write(written)
            result = func(*args, **kwargs)
            for tensor in written:
                self.contents.constant_from_now(tensor)
            if kind.random and isinstance(result, Tensor) and not written:
                self._drawn_anew(result)
            return result
        if self._follower is not None and (alike := self._alike(func, kind, args, written)) is not None:
            again = self._followed(*alike, kwargs)
            if again is not None:
                self.contents.about_to_write(written)
                result = func(*args, **kwargs)
                self._ended_again(again, kind, result, written)
                return result
        named = self._seen_by_name(kwargs) if kwargs else kwargs
        node = Node(func, self._seen(args), named)
        if written:
            self._functional(node, kind)
        if kind.name in BY_MASK or kind.name in PUT_BY_MASK:
            self._freeze_masks(node, kind)
        self.contents.about_to_write(written)
        result = func(*args, **kwargs)
        if repeated is not None:
            by, given = repeated(args, kwargs, result)
            again = None if kind.writes else self._followed(by, given, {})
            if again is not None:
                self._ended_again(again, kind, result)
                return result
            node, written = Node(by, self._seen(given), {}), written[:1] if kind.name.endswith("_") else []
        self._ended(node, kind, written, result)
        if written and kind.name in BATCH_NORMS:
            for tensor in written:
                self.contents.constant_from_now(tensor)
        return result

    def mark(self, key: StateKey, module: nn.Module, drive: Value | None, output: Tensor, weighted: bool) -> Mark:
        """Notes that a call of a watched module returned a tensor: downstream of here it is read as a state."""
        prediction = self.contents.value(output)
        rounding = _rounding(*prediction.meta[2:4])
        mark = None
        if self._follower is not None:
            mark = self._follower.mark(key, module, drive, prediction, rounding, weighted)
        if mark is None:
            self._follower = None
            node = Node(stands_for, (prediction, key), {})
            state = Value(node, prediction.meta)
            node.results.append(state)
            mark = Mark(key, module, prediction if drive is None else drive, prediction, state, rounding, weighted)
        state = mark.state
        assert state.node is not None
        self.record.nodes.append(state.node)
        self.contents.mark(output, state)
        self.record.marks.append(mark)
        return mark

    def _unseen(
        self, func: Any, kind: Traits, args: Any, kwargs: dict[str, Any], written: Sequence[Tensor]
    ) -> Tensor | None:
        """A write, while gradients are off, to what was computed from parameters or states; None for any other."""
        if torch.is_grad_enabled() or len(written) != 1 or kind.random or not (target := written[0]).requires_grad:
            return None
        value, functional = self.contents.known(target), functional_form(func, kind)
        if value is None or value.node is None or functional is None or self.contents.others(target):
            return None
        given = (target, functional, *args[1:])
        node = self._followed(written_unseen, given, kwargs)
        new = None if node is not None else Node(written_unseen, self._seen(given), self._seen_by_name(kwargs))
        self.contents.about_to_write(written)
        result: Tensor = func(*args, **kwargs)
        if node is not None:
            self._ended_again(node, kind, result)
        elif new is not None:
            self._ended(new, kind, [], result)
        return result

    # Following a known record

    def follow(self, trail: Trail) -> None:
        """From its beginning on, the pass is compared with a known one, whose nodes and values it takes over."""

        def take_number(value: Value, number: complex) -> None:
            hold(value, number, self.record)

        self._follower = Follower(trail, self._read, self._is, take_number)

    def _drawn_anew(self, tensor: Tensor) -> None:
        value = self.contents.constant(tensor)
        if self._follower is not None:
            self._drawn.add(value)

    def _read(self, tensor: Tensor) -> Value | None:
        """What a tensor holds; None if this pass has not seen it."""
        value = self.contents.known(tensor)
        if value is None or value in self._drawn:
            return None  # if it was drawn, what it corresponds to shows when it is used
        if value.node is None and value.meta[-1] is not (tensor.requires_grad and tensor.is_leaf):
            return _ANOTHER  # it has been frozen, or set free, since
        return value

    def _is(self, tensor: Tensor, value: Value) -> None:
        """A tensor from outside is what a known value was."""
        now = self.contents.known(tensor)
        if now is None:
            self.contents.from_outside(tensor, value)
            return
        self._drawn.discard(now)
        self.record.inputs[value] = self.record.inputs.pop(now)
        self.contents.bind(tensor, value)

    def _followed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Node | None:
        """The node of the known pass, if this one goes on as that did."""
        node = None if self._follower is None else self._follower.operation(func, args, kwargs)
        if node is None:
            self._follower = None
        return node

    def _alike(self, func: Any, kind: Traits, args: Any, written: Sequence[Tensor]) -> tuple[Any, Any] | None:
        """An operation that writes, as the record has it; None where more goes on than one operation could say."""
        if kind.name in BATCH_NORMS:
            return func, without_statistics(args) if written else args
        functional = None if kind.random or not written else functional_form(func, kind)
        if functional in (None, overwritten) or kind.name in PUT_BY_MASK or self.contents.others(written[0]):
            return None
        return functional, args

    def _ended_again(self, node: Node, kind: Traits, result: Any, written: Sequence[Tensor] = ()) -> None:
        """The same for an operation that is followed."""
        results = result if isinstance(result, list | tuple) else (result,)
        if kind.name in BATCH_NORMS:
            for tensor in written:
                self.contents.constant_from_now(tensor)
        elif written:
            results = (*results, *written)
        if not same_results(node, results):
            self._follower = None
            self._ended(Node(node.func, node.args, node.kwargs), kind, written, result)
            return
        self.record.nodes.append(node)
        for value, tensor in zip(node.results, results, strict=True):
            if value is not None:
                self.contents.bind(tensor, value, keeps=not (tensor._is_view() if written else kind.views))

    def _ended(self, node: Node, kind: Traits, written: Sequence[Tensor], result: Any) -> None:
        results = result if isinstance(result, list | tuple) else (result,)
        tensors = 0
        for tensor in results:
            if not isinstance(tensor, Tensor):
                node.results.append(None)
                continue
            tensors += 1
            value = Value(node, meta_of(tensor))
            node.results.append(value)
            self.contents.bind(tensor, value, keeps=not kind.views)
        if not tensors and not written:
            values = next(iter(node.values()), None)
            if values is not None:
                self.record.reads.append((str(node.func), values))
            return
        self._follower = None
        self.record.nodes.append(node)
        for tensor in written if kind.name not in BATCH_NORMS else ():
            now = self.contents.value(tensor)
            if now.node is not node:  # else it was returned as well: the returned one is what was written
                now = Value(node, meta_of(tensor))
            node.results.append(now)
            self.record.nodes.extend(self.contents.written(tensor, now))

    def _functional(self, node: Node, kind: Traits) -> None:
        """The same operation without writing to anything."""
        if kind.name in BATCH_NORMS:  # statistics of the batch; those that run are no part of what is differentiated
            node.args = without_statistics(node.args)
        elif kind.name == "copy_" and node.args[0].meta[2].is_complex >= node.args[1].meta[2].is_complex:
            # Of what was there before only the kind of tensor matters.
            target, source = node.args[:2]
            node.func, node.args, node.kwargs = copied, (source, target.meta), {}
        elif (functional := functional_form(node.func, kind)) is not None:
            node.func = functional
        else:
            node.written = kind.writes

    def _freeze_masks(self, node: Node, kind: Traits) -> None:
        """How many elements a mask picks belongs to the recorded pass: masks by which others are cut are constants."""
        if kind.name in PUT_BY_MASK and node.args[2].shape.numel() == 1:
            return

        def frozen(arg: Any) -> Any:
            if type(arg) is tuple:
                return tuple([frozen(a) for a in arg])
            if type(arg) is not Value or arg.node is None or arg.meta[2] not in (torch.bool, torch.uint8):
                return arg
            tensor = self.contents.tensor_of(arg)
            constant = Value(None, outside_meta_of(tensor))
            self.record.inputs[constant] = tensor.detach().clone()
            return constant

        node.args = frozen(node.args)

    def function(self, function: type[torch.autograd.Function], run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A custom function is one node: its forward runs while gradients are off, and its backward is in no record."""
        if function.__module__.startswith("torch.distributed") and ".fsdp" not in function.__module__:
            raise _collective(function.__name__)
        if function.__module__.startswith("torch.distributed"):  # it tells FSDP when gradients are there
            with self.pausing():
                result = run(*args, **kwargs)
            pairs = zip(_tensors((args, kwargs)), _tensors(result), strict=False)
            for old, new in pairs:
                self.contents.bind(new, self.contents.value(old))
            return result
        if function.__module__ == "torch.utils.checkpoint":
            raise UnsupportedModuleError(
                "torch.utils.checkpoint with use_reentrant=True runs the layers where nothing can be recorded, so that"
                " they could not relax and their parameters would not learn. Use use_reentrant=False."
            )
        self._follower = None
        node = Node(run, self._seen(args), self._seen_by_name(kwargs))
        before = {id(t) for t in _tensors((args, kwargs))}
        with self.pausing():
            result = run(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        for tensor in results:
            if not isinstance(tensor, Tensor):
                node.results.append(None)
                continue
            if id(tensor) in before and tensor._version:
                raise UnsupportedModuleError(
                    f"The custom autograd function {function.__name__} writes to its input and returns it (mark_dirty):"
                    " what it computes cannot be repeated at other states. Return a new tensor."
                )
            value = Value(node, meta_of(tensor))
            node.results.append(value)
            self.contents.bind(tensor, value, keeps=True)
        self.record.nodes.append(node)
        return result

    def hooked(self, func: Callable[..., Any], call: Any, run: Callable[[Any], Any], args: Any) -> Any:
        """Tensors on their way into, or out of, a module that has backward hooks."""
        with self.pausing():
            result = run(args)
        before = args if isinstance(args, tuple) else (args,)
        after = result if isinstance(result, tuple) else (result,)
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if isinstance(old, Tensor)]
        if any(new is not old for old, new in pairs):
            self._follower = None
            self.record.has_hooks = True
            node = Node(func, (call, *self._seen([old for old, _ in pairs])), {})
            for _, tensor in pairs:
                value = Value(node, meta_of(tensor))
                node.results.append(value)
                self.contents.bind(tensor, value)
            self.record.nodes.append(node)
        return result

    # Tensors and values

    def _seen(self, args: Iterable[Any]) -> tuple[Any, ...]:
        """The arguments with values in the place of tensors."""
        seen: list[Any] = []
        for arg in args:
            if isinstance(arg, Tensor):
                seen.append(self.contents.value(arg))
            elif isinstance(arg, list | tuple):
                seen.append(self._seen(arg))
            elif isinstance(arg, torch.Generator):
                seen.append(None)
            else:
                seen.append(arg)
        return tuple(seen)

    def _seen_by_name(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(kwargs, self._seen(kwargs.values()), strict=True))

    def settled(self) -> Record:
        """The record, when the pass is over."""
        self.contents.settle()
        return self.record

    # Being active

    @property
    def paused(self) -> bool:
        """Whether nothing is recorded."""
        return self.pausing.depth > 0

    def takes_care(self, loss: Tensor, gradient: Tensor | None, options: dict[str, Any]) -> bool:
        """Whether somebody else does what a `backward` call was to do."""
        if self.on_backward is None:
            return False
        return self.on_backward(loss, {**options, "gradient": gradient})

    @contextmanager
    def asking_nobody(self) -> Any:
        """Within it `backward` calls are let pass."""
        before, self.on_backward = self.on_backward, None
        try:
            yield
        finally:
            self.on_backward = before

    @contextmanager
    def handing_over(self) -> Any:
        """Within it nothing is recorded, and gradients of leaves change, which the pass may read before and after."""
        before = [leaf.grad for leaf in self.record.leaves.values() if leaf.grad is not None]
        with self.pausing():
            self.contents.about_to_write(before)
            yield
        for leaf in self.record.leaves.values():
            if leaf.grad is not None:
                for alias in [leaf.grad, *self.contents.others(leaf.grad)]:
                    self.contents.forget(alias)

    def __enter__(self) -> "Recorder":
        calls: Any = TorchCalls(self)
        seams.enter(self)
        calls.__enter__()
        self._entered.append(calls)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.pop().__exit__(*error)
        seams.leave(self)
        if not self._entered:
            self._follower = None  # the pass is over


_ANOTHER = Value(None, ())


def _collective(name: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"The step differentiates through a collective ({name}): it would have to run at every state of a relaxation,"
        " and every rank takes as many as its own batch needs, so that ranks would wait for each other for ever. Gather"
        " what is a constant (torch.no_grad, or all_gather without sync_grads), or compute the loss locally."
    )


def _tensors(held: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    kind = device.type
    computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    return max(_eps(dtype), _eps(computed_in))


@cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if is_continuous(dtype) else 0.0
