"""Running a record with states in their places: the plain way, and the oracle of any faster one."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ebm.energies import LayerView
from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.program.custom_calls import is_of_the_users
from lightning_ebm.program.elsewhere import elsewhere
from lightning_ebm.program.held import Held, ancestors, ordered
from lightning_ebm.program.named import named
from lightning_ebm.program.operations import only_views, splits_unsafely
from lightning_ebm.program.products import Product, products_of, sent_back_by
from lightning_ebm.program.record import Mark, Node, Record, StateKey, Value, depending, eps_of
from lightning_ebm.program.seams import hooked_input, hooked_output

StateOf = Callable[[StateKey, Tensor], Tensor | None]
"""Chooses x_l from the key and the prediction; None leaves the call alone."""


@dataclass
class Call:
    """What one pass saw at one layer.

    Attributes:
        key: which call.
        module: the module called.
        drive: a_l; the prediction where the layer is a block.
        prediction: mu_l, in at least float32, with its graph down to the parents' states.
        state: x_l, a leaf in at least float32.
    """

    key: StateKey
    module: nn.Module
    drive: Tensor
    prediction: Tensor
    state: Tensor

    def view(self, above: int) -> LayerView:
        """What an energy may know of it."""
        activation = None if self.drive is self.prediction else self.module
        return LayerView(self.key.name, self.key.call, self.drive, self.prediction, activation, above)


@dataclass
class Pass:
    """One run of a program.

    Attributes:
        layers: what it saw at each layer, in the order of the user's pass.
        loss: the user's loss, of shape ().
        rounding: see `Program.rounding`.
    """

    layers: list[Call] = field(default_factory=list)
    loss: Any = None
    rounding: float = 0.0

    @property
    def states(self) -> list[Tensor]:
        """x_l of every layer."""
        return [call.state for call in self.layers]


def at_prediction() -> StateOf:
    """x_l = mu_l, as a leaf."""
    return lambda key, mu: mu.detach().requires_grad_()


def at_states(states: Mapping[StateKey, Tensor]) -> StateOf:
    """x_l as given, as a leaf."""
    return lambda key, _: states[key].detach().requires_grad_()


class Program:
    """(states, parameters, what the batch fixed) -> (drives a_l, predictions mu_l, loss), of one user's pass.

    Args:
        record: of that pass.
        marks: the calls that carry states, in order.
        loss: the value of its loss; None leaves it out.
    """

    def __init__(self, record: Record, marks: Sequence[Mark], loss: Value | None) -> None:
        self.record = record
        self.marks = list(marks)
        self.loss = loss

    @cached_property
    def order(self) -> list[Node]:
        """The operations that lead to predictions, drives and loss."""
        return ordered(self.record, [*([] if self.loss is None else [self.loss]), *_ends(self.marks)])

    @cached_property
    def rounding(self) -> float:
        """Relative, of the coarsest arithmetic that states, or what is differentiated, pass through.

        A softmax or a norm taken in float32 within a network of doubles rounds the forces of all layers below it to
        single precision. What autocast casts is in the record; what it leaves alone, as doubles, is not rounded.
        """
        moving = depending({*self.record.leaves, *(mark.state for mark in self.marks)}, self.order)
        return max((eps_of(value.meta[2]) for value in moving if value not in self.record.leaves), default=0.0)

    def between_states(self) -> list[Node]:
        """The operations that lead from states to predictions and drives; not those of the loss."""
        moving = depending({mark.state for mark in self.marks}, self.order)
        between = ancestors(_ends(self.marks)) & {value.node for value in moving}
        return [node for node in self.order if node in between]

    @cached_property
    def _last(self) -> dict[Node, list[Value]]:
        return _last_uses(self.order, self.marks, [] if self.loss is None else [self.loss])

    @cached_property
    def products(self) -> list[Product]:
        """Where states meet weights, see `products_of`."""
        if (code := self.user_code()) is not None:
            raise UnsupportedModuleError(f"Feedback operators cannot be put into code of the user's own ({code}).")
        return products_of(self)

    def weights(self, given: Mapping[Value, Tensor] = MappingProxyType({})) -> list[Tensor]:
        """The weights that states are multiplied by, as the products take them."""
        values = [product.node.args[product.weight] for product in self.products]
        needed, held = ancestors(values), Held(self.record, given)
        for node in self.order:
            if node in needed:
                held.run(node)
        return [held[value].detach() for value in values]

    def run(
        self,
        state_of: StateOf,
        given: Mapping[Value, Tensor] = MappingProxyType({}),
        feedback: Sequence[Tensor] | None = None,
        crossed: bool = False,
    ) -> Pass:
        """One pass, cut at the states: x_l is a leaf, mu_l a function of the parents' states and of the parameters.

        Args:
            state_of: gives the states.
            given: what to take in place of what the batch fixed.
            feedback: what slopes go back through in place of each of `weights`; None is the weights themselves.
            crossed: values go up through `feedback` and slopes back through `weights`, but for the read-out's.
        """
        seen, held = Pass(rounding=self.rounding), Held(self.record, given)
        if feedback is not None:
            pairs = zip(self.products, feedback, strict=True)
            held.instead = {
                product.node: sent_back_by(product, operator, crossed)
                for product, operator in pairs
                if not (crossed and product.read_out)
            }
        at = {mark.state.node: mark for mark in self.marks}
        for node in self.order:
            mark = at.get(node)
            if mark is None:
                try:
                    held.run(node)
                except UnsupportedModuleError as error:
                    raise UnsupportedModuleError(f"{error} It is computed {self._place(node)}.") from error
                except (IndexError, RuntimeError, ValueError) as error:
                    raise elsewhere(error, f"{named(node.func).name}, {self._place(node)}") from error
            else:
                original = held[mark.prediction]
                prediction = at_least_float32(original)
                drive = prediction if mark.drive is mark.prediction else at_least_float32(held[mark.drive])
                state = state_of(mark.key, prediction)
                state = prediction if state is None else state
                narrower = state.dtype != original.dtype and not state.is_complex()
                held.hand_out(mark.state, state.to(original.dtype) if narrower else state)
                seen.layers.append(Call(mark.key, mark.module, drive, prediction, state))
            for value in self._last.get(node, ()):
                held.free(value)
        if self.loss is not None:
            seen.loss = held[self.loss].reshape(())
        return seen

    def _place(self, node: Node) -> str:
        """Where an operation stands, in the user's terms."""
        following = self.order[self.order.index(node) :]
        keys = {mark.state.node: mark for mark in self.marks}
        mark = next((keys[n] for n in following if n in keys), None)
        return (
            "between the last layers and the loss" if mark is None else f"in {type(mark.module).__name__} {mark.key!s}"
        )

    def given(self) -> list[Value]:
        """What the batch fixed: values that no operation here computes, and leaves."""
        found: dict[Value, None] = {}
        for node in self.order:
            for value in node.values():
                if value.node is None or value in self.record.leaves:
                    found[value] = None
        for mark in self.marks:
            for value in (mark.prediction, mark.drive):
                if value.node is None:
                    found[value] = None
        return list(found)

    def content(self, value: Value) -> Tensor:
        """What a given value holds, without a graph."""
        record = self.record
        return (record.inputs[value] if value in record.inputs else record.leaves[value]).detach()

    def not_traceable(self) -> str | None:
        """Why no code can be traced from it, if so: user's own code runs in its midst."""
        if any(node.written for node in self.order):
            return "operations that write to several tensors"
        return self.user_code()

    def user_code(self) -> str | None:
        """Which code of the user's own runs in its backward pass, if any."""
        if self.record.hooks:
            return "gradient hooks"
        functions = [node.func for node in self.order]
        if hooked_input in functions or hooked_output in functions:
            return "backward hooks of modules"
        own = next(filter(is_of_the_users, functions), None)
        return None if own is None else f"custom functions: {named(own).name.rpartition('.')[2]}"

    def overwritten(self) -> bool:
        """Whether memory that its gradient may hang on has been written to where autograd does not look."""
        if not (late := set(self.record.overwritten)):
            return False
        learned = depending(set(self.record.leaves), self.order)
        for node in self.order:
            if not late.isdisjoint(node.values()):
                if splits_unsafely(node.func):  # autograd keeps nothing of it, and asks the parts who wrote to them
                    continue
                if only_views(node.func):  # they lie in the same memory
                    late.update(filter(None, node.results))
                elif not learned.isdisjoint(node.results):
                    return True
        return False

    def outline(self) -> "Program":
        """The same program without any tensor of the batch: it runs on what is given."""
        bare = copy.copy(self)
        bare.__dict__.update(order=self.order, _last=self._last, rounding=self.rounding)
        with suppress(UnsupportedModuleError):
            bare.__dict__.update(products=self.products)  # which are found by the parameters
        bare.record = Record()
        return bare

    def uncut(self) -> Tensor:
        """The loss, of shape (), in the graph that backprop would differentiate."""
        assert self.loss is not None
        held = Held(self.record)
        for node in ordered(self.record, [self.loss]):
            held.run(node)
        return held[self.loss].reshape(())


def _ends(marks: Sequence[Mark]) -> list[Value]:
    return [value for mark in marks for value in (mark.prediction, mark.drive, mark.state)]


def _last_uses(order: Sequence[Node], marks: Sequence[Mark], kept: Collection[Value]) -> dict[Node, list[Value]]:
    """After which operation each value is read no more."""
    last: dict[Value, Node] = {}
    drives = {mark.state.node: mark.drive for mark in marks}
    for node in order:
        for value in node.values():
            last[value] = node
        if node in drives:
            last[drives[node]] = node
    found: dict[Node, list[Value]] = {}
    for value, node in last.items():
        if value not in kept:
            found.setdefault(node, []).append(value)
    return found


def at_least_float32(tensor: Tensor) -> Tensor:
    """States and energies live in float32 even where the network computes in less: phase differences would drown."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
