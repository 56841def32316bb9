"""Recording one pass of the user's code, below autograd, without changing what it computes.

The pass runs uncut: no value is replaced, so whatever the user's own code differentiates is right. Each tensor
operation made while gradients are on becomes a `Node`. What is computed while they are off, and what the user
detaches, is a constant of the record, as are random draws and the numbers that Python reads off tensors: the record is
of the program that ran.

Longer than 300 lines, as what becomes of an operation depends on what else becomes of it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ebm.program.aliasing import counted_together, same_place
from lightning_ebm.program.at_value import content_of, written_unseen
from lightning_ebm.program.before import Before
from lightning_ebm.program.collectives import NAMESPACES, collective
from lightning_ebm.program.contents import Contents
from lightning_ebm.program.custom_calls import higher_order
from lightning_ebm.program.dispatch import DispatchMode
from lightning_ebm.program.effects import Effects
from lightning_ebm.program.following import Following
from lightning_ebm.program.not_recorded import not_dense
from lightning_ebm.program.operations import (
    BATCH_NORMS,
    BY_MASK,
    PUT_BY_MASK,
    Traits,
    copied,
    functional_form,
    replaced_by_copy,
    tensors_at,
    traits,
    without_statistics,
)
from lightning_ebm.program.pause import Pause
from lightning_ebm.program.picked import counts, freeze_masks, picks
from lightning_ebm.program.random_draws import Repeated, draws, repeated_without_drawing
from lightning_ebm.program.record import (
    Mark,
    Node,
    Record,
    StateKey,
    Value,
    is_leaf,
    meta_of,
    stands_for,
)
from lightning_ebm.program.seams import seams
from lightning_ebm.program.tensors import listed, tensors_in
from lightning_ebm.program.torch_calls import TorchCalls

TakesCare = Callable[[Tensor, dict[str, Any]], bool]
"""Told of a `backward` call, by the tensor and its options; answers whether it has done what the call was to do."""

_ALIAS, _DETACH = torch.ops.aten.alias.default, torch.ops.aten.detach.default


class Recorder(DispatchMode):
    """Records while it is active as a context manager; it may be entered several times.

    Args:
        undoes: note what tensors that were there before hold before they are written to, so that `undo` can put it
            back; or of which tensors alone.
    """

    supports_higher_order_operators = True

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
        self.following = Following(self.record, self.contents)
        self._entered: list[Any] = []
        self._effects: Effects | None = None

    # What is recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        records = not self.pausing.depth and torch.is_grad_enabled()
        are_fixed = self.contents.are_fixed
        fixed = records and are_fixed(args) and (not kwargs or are_fixed(kwargs.values()))
        known = records and not fixed and func is self.following.next
        if known and (result := self.following.run(func, args, kwargs, self._gave_other)) is not NotImplemented:
            return result  # most operations, from the second step on
        if isinstance(func, torch._ops.HigherOrderOperator):
            raise higher_order(func.name())
        if self.pausing.depth:
            return func(*args, **kwargs) if self._effects is None else self._effects.run(func, args, kwargs)
        if func is _DETACH and not self.asked:  # autograd's own, of a tensor that it saves: the same value
            return self._named_again(func(*args), args[0])
        kind = traits(func)
        fixed = fixed or (records and kind.by_shape and self.contents.are_from_before(args))
        if kind.plain and records and not fixed:
            result = self.following.run(func, args, kwargs, self._gave_other)
            return self._computed(func, kind, args, kwargs) if result is NotImplemented else result
        if kind.unfilled:  # no operation: what it holds when it is first read; the same in every run that fills it
            result = func(*args, **kwargs)
            return result.zero_() if result.layout is torch.strided else result
        written = tensors_at(kind, args, kwargs) if kind.writes else []
        if fixed or self._is_constant(func, kind, args, kwargs, written):
            result = self._constant(func, kind, args, kwargs, written)
            self._gained(func, args, kwargs, written)
            return result
        repeated = None
        if kind.random and draws(func, args, kwargs):
            repeated = repeated_without_drawing(kind, args)
            if repeated is None:
                return self._constant(func, kind, args, kwargs, written)
        return self._operation(func, kind, args, kwargs, written, repeated)

    def _computed(self, func: Any, kind: Traits, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operation that only computes, and that no known pass makes here, and records it."""
        node = Node(func, self.seen(args), self.seen_by_name(kwargs) if kwargs else kwargs)
        result = func(*args, **kwargs)
        self._ended(node, kind, [], result)
        return result

    def _gave_other(self, node: Node, result: Any) -> None:
        self._ended(Node(node.func, node.args, node.kwargs), traits(node.func), [], result)

    def _is_constant(self, func: Any, kind: Traits, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> bool:
        """Whether what an operation computes is a constant of the record, whatever it computes that from."""
        if not torch.is_grad_enabled() or func is _DETACH or picks(self.contents, kind, args):
            return True
        if written and counts(self.contents, args, written):
            return True
        if self.contents.unseen_by_autograd(written):
            return True
        if func.namespace in NAMESPACES:
            # What those of c10d read has no slope in what they write.
            through = written if func.namespace == "c10d" else tensors_in((args, kwargs))
            if any(tensor.requires_grad for tensor in through):
                raise collective(str(func))
            return True
        return False

    def _constant(self, func: Any, kind: Traits, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
        """Runs an operation whose results are constants, unless it writes to what is none."""
        if (unseen := self._unseen(func, kind, args, kwargs, written)) is not None:
            return unseen
        self.contents.about_to_write(written)
        result = func(*args, **kwargs)
        made = () if written else listed(result)
        self.contents.notice(listed((*args, *kwargs.values())), made, kind.views or func is _DETACH)
        for tensor in written:
            computed = self.contents.computed_in(tensor) if func.namespace in NAMESPACES else []
            self.contents.constant_from_now(tensor, but=computed)
            self._by_others(computed, kind)
        if kind.random and isinstance(result, Tensor) and not written:
            self.following.drew(result)
        return result

    def _gained(self, func: Any, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> None:
        """Detached tensors that what has a gradient was written to have one from now on, as autograd sees it."""
        if not written or not torch.is_grad_enabled() or func.namespace in NAMESPACES:
            return
        if any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
            for tensor in written:
                self.contents.gained(tensor)

    def _operation(
        self,
        func: Any,
        kind: Traits,
        args: Any,
        kwargs: dict[str, Any],
        written: list[Tensor],
        repeated: Repeated | None,
    ) -> Any:
        """Runs an operation and records it: the one of the known pass, or a new one.

        Args:
            func: which.
            kind: of operation.
            args: what it is given.
            kwargs: and by name.
            written: to which of those it writes.
            repeated: what is recorded in its place where it draws, see `repeated_without_drawing`.
        """
        follows = repeated is None and self.following.follows
        if follows and (alike := self.following.alike(func, kind, args, written)) is not None:
            again = self.following.operation(*alike, kwargs)
            if again is not None:
                self._about_to_compute_in(written)
                result = func(*args, **kwargs)
                self._ended_again(again, kind, result, written)
                return result
        node = None
        if repeated is None:
            node = Node(func, self.seen(args), self.seen_by_name(kwargs) if kwargs else kwargs)
            if written:
                self._functional(node, kind, written)
            if kind.name in BY_MASK or kind.name in PUT_BY_MASK:
                freeze_masks(self.contents, node, kind)
        self._about_to_compute_in(written)
        result = func(*args, **kwargs)
        if repeated is not None:
            by, given = repeated(args, kwargs, result)
            again = None if kind.writes else self.following.operation(by, given, {})
            if again is not None:
                self._ended_again(again, kind, result)
                return result
            node, written = Node(by, self.seen(given), {}), written[:1] if kind.name.endswith("_") else []
        assert node is not None
        self._ended(node, kind, written, result)
        if written and kind.name in BATCH_NORMS:
            for tensor in written:
                self.contents.constant_from_now(tensor)
        return result

    def _about_to_compute_in(self, written: Sequence[Tensor]) -> None:
        """What shares the memory that is written to is read before, and again from what is written."""
        for tensor in written:
            for alias in self.contents.unread(tensor):
                self.following.drew(alias)
        self.contents.about_to_write(written)

    def mark(self, key: StateKey, module: nn.Module, drive: Value | None, output: Tensor, weighted: bool) -> Mark:
        """Notes that a call of a watched module returned a tensor: downstream of here it is read as a state."""
        prediction = self.contents.value(output)
        mark = self.following.mark(key, module, drive, prediction, weighted)
        if mark is None:
            node = Node(stands_for, (prediction, key), {})
            state = Value(node, prediction.meta)
            node.results.append(state)
            mark = Mark(key, module, prediction if drive is None else drive, prediction, state, weighted)
        state = mark.state
        assert state.node is not None
        self.record.nodes.append(state.node)
        self.contents.mark(output, state)
        self.record.marks.append(mark)
        return mark

    def _named_again(self, result: Tensor, tensor: Tensor) -> Tensor:
        """Another name of what a tensor holds; of a parameter, one that code compiled by torch.jit computes with."""
        if not (is_leaf(tensor) and torch.is_grad_enabled()):
            return self.contents.aliased(result, tensor)
        node = self.following.operation(_ALIAS, (tensor,), {})
        if node is not None:
            self._ended_again(node, traits(_ALIAS), result)
        else:
            self._ended(Node(_ALIAS, self.seen((tensor,)), {}), traits(_ALIAS), [], result)
        return result

    def _unseen(
        self, func: Any, kind: Traits, args: Any, kwargs: dict[str, Any], written: Sequence[Tensor]
    ) -> Tensor | None:
        """A write that autograd does not see to what was computed from parameters or states; None for any other."""
        if len(written) != 1 or kind.random or (functional := functional_form(func, kind)) is None:
            return None
        computed = self.contents.computed_in(written[0])
        if len(computed) != 1 or not same_place(target := computed[0], written[0]):
            return None
        if torch.is_grad_enabled() if target is written[0] else not counted_together(written[0], target):
            return None
        given = (target, functional, *args[1:])
        node = self.following.operation(written_unseen, given, kwargs)
        new = None if node is not None else Node(written_unseen, self.seen(given), self.seen_by_name(kwargs))
        self.contents.about_to_write(written)
        result: Tensor = func(*args, **kwargs)
        self.contents.constant_from_now(written[0], but=[target])
        if node is not None:
            self._ended_again(node, kind, target)
        elif new is not None:
            self._ended(new, kind, [], target)
        return result

    def _by_others(self, computed: Sequence[Tensor], kind: Traits) -> None:
        """Other ranks have written to what the pass has computed, or are about to: it keeps its slope.

        So does a loss that is reduced for a logger, detached and not cloned.
        """
        for tensor in computed:
            with self.pausing():
                given = tensor, content_of, tensor.detach()
            node = self.following.operation(written_unseen, given, {})
            if node is not None:
                self._ended_again(node, kind, tensor)
            else:
                self._ended(Node(written_unseen, self.seen(given), {}), kind, [], tensor)

    def _ended_again(self, node: Node, kind: Traits, result: Any, written: Sequence[Tensor] = ()) -> None:
        """An operation that was followed is over."""
        given = results = listed(result)
        if kind.name in BATCH_NORMS:
            for tensor in written:
                self.contents.constant_from_now(tensor)
            written = ()
        elif written:
            results = (*given, *written)
        if not self.following.takes(node, results, None if written else kind.views):
            return self._ended(Node(node.func, node.args, node.kwargs), kind, written, result)
        for tensor, now in zip(written, node.results[len(given) :], strict=True):
            if now is not None:
                self.contents.written(tensor, now, self.made)

    def _ended(self, node: Node, kind: Traits, written: Sequence[Tensor], result: Any) -> None:
        results = listed(result)
        tensors = 0
        for tensor in results:
            if not isinstance(tensor, Tensor):
                node.results.append(None)
                continue
            tensors += 1
            if tensor.is_nested:
                raise not_dense(tensor)
            value = Value(node, meta_of(tensor))
            node.results.append(value)
            self.contents.bind(tensor, value, keeps=not kind.views)
        if not tensors and not written:
            values = next(iter(node.values()), None)
            if values is not None:
                self.record.reads.append((str(node.func), values))
            return
        self.following.stop()
        self.record.nodes.append(node)
        for tensor in written if kind.name not in BATCH_NORMS else ():
            now = self.contents.value(tensor)
            if now.node is not node:  # else it was returned as well: the returned one is what was written
                now = Value(node, meta_of(tensor))
            node.results.append(now)
            self.contents.written(tensor, now, self.made)

    def made(self, func: Any, args: tuple[Any, ...], like: Tensor) -> Value:
        """Notes an operation that no call was made for, see `Make`."""
        value = self.following.made(func, args, meta_of(like))
        if value is None:
            node = Node(func, args, {})
            value = Value(node, meta_of(like))
            node.results.append(value)
            self.record.nodes.append(node)
        return value

    def _functional(self, node: Node, kind: Traits, written: Sequence[Tensor]) -> None:
        """The same operation without writing to anything."""
        if kind.name in BATCH_NORMS:  # statistics of the batch; those that run are no part of what is differentiated
            node.args = without_statistics(node.args)
        elif kind.name == "copy_" and node.args[0].meta[2].is_complex >= node.args[1].meta[2].is_complex:
            # Of what was there before only the kind of tensor matters, and whether it has a slope.
            target, source = node.args[:2]
            before = (target,) if replaced_by_copy(written[0]) else ()
            node.func, node.args, node.kwargs = copied, (source, target.meta, *before), {}
        elif (functional := functional_form(node.func, kind)) is not None:
            node.func = functional
        else:
            node.written = kind.writes

    # Tensors and values

    def seen(self, args: Iterable[Any]) -> tuple[Any, ...]:
        """The arguments with values in the place of tensors."""
        seen: list[Any] = []
        for arg in args:
            if isinstance(arg, Tensor):
                seen.append(self.contents.value(arg))
            elif isinstance(arg, list | tuple):
                seen.append(self.seen(arg))
            elif isinstance(arg, torch.Generator):
                seen.append(None)
            else:
                seen.append(arg)
        return tuple(seen)

    def seen_by_name(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The same for arguments by name."""
        return dict(zip(kwargs, self.seen(kwargs.values()), strict=True))

    def settled(self) -> Record:
        """The record, when the pass is over."""
        self.contents.settle()
        return self.record

    # Being active

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
    def observing(self, effects: Effects) -> Any:
        """Within it nothing is recorded, and what is done besides computing is noted."""
        before, self._effects = self._effects, effects
        try:
            with self.pausing():
                yield
        finally:
            self._effects = before

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
        if not self._entered:
            torch.clear_autocast_cache()  # weights that another pass has cast would come with its graph
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
            self.following.stop()  # the pass is over
            torch.clear_autocast_cache()
