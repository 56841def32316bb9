"""Following known records: from the second step on nothing is built, as long as the same operations come again."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.program.contents import Contents
from lightning_ebm.program.numbers import hold
from lightning_ebm.program.operations import (
    BATCH_NORMS,
    BY_MASK,
    PUT_BY_MASK,
    Traits,
    copied,
    functional_form,
    replaced_by_copy,
    traits,
    without_statistics,
)
from lightning_ebm.program.record import Mark, Meta, Node, Record, StateKey, Value, meta_of, outside_meta_of, stands_for
from lightning_ebm.program.tensors import listed
from lightning_ebm.program.trail import Trail, same_constant, same_results


class Following:
    """Compares a pass with known ones, operation by operation, and hands out the nodes of that which it is so far.

    What it has handed out is equal in operations, constants, shapes, strides, kinds of numbers, devices, parameters and
    in what is computed from what. Known passes that begin alike have these nodes in common, as branches of a tree have:
    where a pass does something else than the one it is compared with, as with batches of another length, it may be the
    next one. Where it is none it follows no more: it goes on from the nodes that it was given, and is a new branch.

    Args:
        record: of this pass.
        contents: what its tensors hold.
    """

    def __init__(self, record: Record, contents: Contents) -> None:
        self._record = record
        self._contents = contents
        self._trail: Trail | None = None
        self._known: Sequence[Trail] = ()
        self._at = 0
        self.next: Any = None
        """The function of the operation that comes next in the known pass, where that is a plain one."""
        self._taken: set[Value] = set()
        self._drawn: set[Value] = set()
        """What was drawn while a known pass is followed, and nothing has read yet."""

    @property
    def follows(self) -> bool:
        """Whether the pass has been the known one so far."""
        return self._trail is not None

    def begin(self, known: Sequence[Trail]) -> None:
        """From its beginning on, the pass is compared with known ones, the first first."""
        self._known, self._trail = known, known[0]
        self.next = known[0].plain[0]

    def stop(self) -> None:
        """The pass does something else, or is over."""
        self._trail = self.next = None

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], ended: Callable[[Node, Any], None]) -> Any:
        """Runs a plain operation, if a known pass makes it here, and notes what it gave.

        Most operations come this way, which therefore asks as little of others as it can.

        Args:
            func: which.
            args: what it is given.
            kwargs: and by name.
            ended: told of one that gave something else this time.

        Returns:
            the result; `NotImplemented` where the known pass did something else, and nothing has run.
        """
        trail, at = self._trail, self._at
        if trail is None:
            return NotImplemented
        node = trail.nodes[at]
        if func is not self.next or kwargs or node is None or node.kwargs or not self._all_same(args, node.args):
            node = self.operation(func, args, kwargs)
            if node is None:
                return NotImplemented
        else:
            self._at = at + 1
            self.next = trail.plain[at + 1]
        result = func(*args, **kwargs)
        found, views = node.results, traits(func).views
        if len(found) != 1 or not isinstance(result, Tensor):
            if not self.takes(node, result, views):
                ended(node, result)
        elif (value := found[0]) is not None and value.meta == meta_of(result):
            self._record.nodes.append(node)
            self._contents.bind(result, value, not views)
        else:
            self.stop()
            ended(node, result)
        return result

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Node | None:
        """The node of an operation that is about to run; None if the known pass did something else here."""
        trail = self._trail
        if trail is None:
            return None
        node = trail.nodes[self._at]
        if node is not None and node.func is func and self._same_arguments(node, args, kwargs):
            self._at += 1
            self.next = trail.plain[self._at]
            return node
        return self._branch(lambda other: other.func is func and self._same_arguments(other, args, kwargs))

    def mark(self, key: StateKey, module: Any, drive: Value | None, prediction: Value, weighted: bool) -> Mark | None:
        """The mark of a call that has returned; None if the known pass did something else here."""
        was = module, drive or prediction, weighted

        def fits(node: Node) -> bool:
            if self._trail is None or node.func is not stands_for or node.args != (prediction, key):
                return False
            mark = self._trail.marks[node]
            return (mark.module, mark.drive, mark.weighted) == was

        node = self._next(fits)
        return None if node is None or self._trail is None else self._trail.marks[node]

    def alike(self, func: Any, kind: Traits, args: Any, written: Sequence[Tensor]) -> tuple[Any, Any] | None:
        """An operation that is not plain, as the record has it; None where more goes on than one could say."""
        if kind.name in BATCH_NORMS:
            return func, without_statistics(args) if written else args
        if not written and (kind.random or kind.name in BY_MASK or kind.name in PUT_BY_MASK):
            return func, args  # it could draw, and does not; it picks: masks that the pass computes are constants there
        if kind.name == "copy_":
            before = args[:1] if replaced_by_copy(args[0]) else ()
            return copied, (args[1], self._contents.value(args[0]).meta, *before)
        functional = None if kind.random or not written else functional_form(func, kind)
        return None if functional is None else (functional, args)

    def made(self, func: Any, args: tuple[Any, ...], meta: Meta) -> Value | None:
        """What an operation gave that no call was made for; None if the known pass did something else here."""

        def fits(node: Node) -> bool:
            value = node.results[0] if node.func is func and self._are_read(args, node.args) else None
            return value is not None and value.meta == meta

        node = self._next(fits)
        if node is None:
            return None
        self._record.nodes.append(node)
        return node.results[0]

    def _are_read(self, args: Sequence[Any], known_ones: Sequence[Any]) -> bool:
        """Whether values are those of a known pass, or were drawn and may be."""
        return len(args) == len(known_ones) and all(
            arg == known or (arg in self._drawn and self._is_read(arg, known))
            for arg, known in zip(args, known_ones, strict=True)
        )

    def _is_read(self, drawn: Value, known: Any) -> bool:
        """Whether what was drawn may be what the known pass read here; it is, from now on."""
        if type(known) is not Value or known.node is not None or known in self._taken:
            return False
        tensor = next(iter(self._contents.holding(drawn)), None)
        return tensor is not None and self._is_again(tensor, known, drawn)

    def takes(self, node: Node, results: Any, views: bool | None) -> bool:
        """An operation that was handed out is over: whether it gave what it gave before, which is bound if so.

        Args:
            node: which.
            results: what it gave, one tensor or several things.
            views: whether those are views of its arguments, which are not kept; None where each is asked.
        """
        found, bind = node.results, self._contents.bind
        results = listed(results)
        if not same_results(node, results):
            self.stop()
            return False
        self._record.nodes.append(node)
        for value, tensor in zip(found, results, strict=True):
            if value is not None:
                bind(tensor, value, not (tensor._is_view() if views is None else views))
        return True

    def drew(self, tensor: Tensor) -> None:
        """A constant was drawn: what it corresponds to shows when it is used."""
        value = self._contents.constant(tensor)
        if self.follows:
            self._drawn.add(value)

    def _next(self, fits: Callable[[Node], bool]) -> Node | None:
        """What comes next in a known pass that has been the same so far, if it fits."""
        trail = self._trail
        node = None if trail is None else trail.nodes[self._at]
        if trail is None or node is None or not fits(node):
            return self._branch(fits)
        self._at += 1
        self.next = trail.plain[self._at]
        return node

    def _branch(self, fits: Callable[[Node], bool]) -> Node | None:
        """The same of the passes that are not followed yet: that which it fits is followed from here on, or none."""
        here, at = self._trail, self._at
        if here is None:
            return None
        tried = [here.nodes[at]]
        for other in self._known:
            if at < len(other.nodes) and (at == 0 or other.nodes[at - 1] is here.nodes[at - 1]):
                node = other.nodes[at]
                if node is None or node in tried:
                    continue
                tried.append(node)
                self._trail = other  # it is asked for its parameters
                if fits(node):
                    self._at += 1
                    self.next = other.plain[self._at]
                    return node
        self.stop()
        return None

    def _same_arguments(self, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        if len(kwargs) != len(node.kwargs) or not self._all_same(args, node.args):
            return False
        for name, arg in kwargs.items():
            if name not in node.kwargs or not self._same(arg, node.kwargs[name]):
                return False
        return True

    def _all_same(self, args: Sequence[Any], known_ones: Sequence[Any]) -> bool:
        if len(args) != len(known_ones):
            return False
        bindings = self._contents.bindings
        for arg, known in zip(args, known_ones, strict=True):
            if arg is known:  # a number
                continue
            if type(known) is Value and known.node is not None:  # computed by the pass, as most are
                bound = bindings.get(id(arg))
                if bound is not None and bound[1] is known and bound[0].ref() is arg:
                    continue
            if not self._same(arg, known):
                return False
        return True

    def _same(self, arg: Any, known: Any) -> bool:
        if type(arg) is int:  # a size, mostly
            return (type(known) is int and arg == known) or (type(known) is Value and self._is_number(arg, known))
        if isinstance(arg, Tensor):
            return type(known) is Value and self._holds(arg, known)
        if isinstance(arg, list | tuple):
            if not isinstance(known, tuple) or len(arg) != len(known):
                return False
            return all(map(operator.is_, arg, known)) or self._all_same(arg, known)  # sizes and flags, mostly
        if isinstance(arg, torch.Generator):
            return known is None
        if type(known) is Value:
            return isinstance(arg, int | float) and self._is_number(arg, known)
        return same_constant(arg, known)

    def _is_number(self, number: float, known: Value) -> bool:
        """Whether the known pass has an input for a number here, which then holds this one."""
        if known.number is not type(number):
            return False
        hold(known, number, self._record)
        return True

    def _holds(self, tensor: Tensor, known: Value) -> bool:
        """Whether a tensor holds what the known pass read here."""
        value = self._contents.known(tensor)
        if value is not None and value not in self._drawn:
            return value is known and (known.node is not None or self._contents.is_as_read(tensor, known))
        return known.node is None and known not in self._taken and self._is_again(tensor, known, value)

    def _is_again(self, tensor: Tensor, known: Value, drawn: Value | None) -> bool:
        """Whether a tensor that nothing has read yet may be what the known pass read from outside."""
        assert self._trail is not None
        leaf = self._trail.leaves.get(known)
        if known.meta != outside_meta_of(tensor) or (leaf is not None and not self._trail.takes(known, tensor)):
            return False
        self._taken.add(known)
        if drawn is not None:
            self._drawn.discard(drawn)
            self._record.inputs[known] = self._record.inputs.pop(drawn)
            self._contents.rename(tensor, drawn, known)
        elif leaf is not None and leaf() is tensor:  # it was looked at when it was read first
            self._record.inputs[known] = tensor
        else:
            self._contents.from_outside(tensor, known)
            return True
        if leaf is not None:
            self._record.leaves[known] = tensor
        self._contents.bind(tensor, known)
        return True
