"""How local the updates of a network's weights are, given where its states sit."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ebm.program.module_walk import modules_of, parameters_of
from lightning_ebm.program.operations import is_by_shape, is_operator, traits
from lightning_ebm.program.record import Mark, Node, Record, StateKey, Value, depending, values_in


class Locality(NamedTuple):
    """How local updates are, by elements of weights, 0 to 1.

    Attributes:
        mean: `sum_w |w| l(w) / sum_w |w|` with `l(w) = 1 / chain(w)`, 0 where w is trained around the states or through
            itself.
        share: the share of those with `l(w) = 1`.
        none: the share of those with `l(w) = 0`.
    """

    mean: float
    share: float
    none: float = 0.0


class Judged(NamedTuple):
    """A set of modules that was compared with others.

    Attributes:
        what: in words.
        states: how many it would give.
        mean: see `Locality`.
        share: see `Locality`.
    """

    what: str
    states: int
    mean: float
    share: float


class Products:
    """The operations of a record in which what flows through the network is multiplied by trainable weights.

    Matrix products, convolutions, whole recurrent layers. Not scales, shifts and norms, which act on each feature by
    itself, and not tables that are looked up, which the network begins with. Weights that are computed from parameters
    alone, as under weight norm, count as those parameters, and so do those that constants are put into, see
    `_mixes`; rows that integers look up are data.

    Args:
        module: the user's module.
        record: of its pass.
    """

    def __init__(self, module: nn.Module, record: Record) -> None:
        self._nodes = record.nodes
        self._leaves = record.leaves
        self._weights: dict[Node, list[Tensor]] = {}
        trained = {id(p) for p in parameters_of(modules_of(module)) if p.requires_grad}
        learned = depending(set(record.leaves), record.nodes)
        weights = {value: [leaf] for value, leaf in record.leaves.items() if id(leaf) in trained}
        mixed = set[Value]()
        for node in record.nodes:
            found = [value for value in node.values() if value in weights]
            if not found or is_by_shape(node.func):
                continue
            others = [value for value in node.values() if value not in weights and not _is_number(value)]
            multiplies = _multiplies(node)
            if multiplies and not others:  # what constants were put into may be what flows: the batch, and positions
                others = [value for value in found if value in mixed and len(value.shape) > 1]
                pure = [value for value in found if value not in others]
                found = pure if any(len(value.shape) > 1 for value in pure) else found
                others = others if found is pure else []
            leaves = [leaf for value in found for leaf in weights[value]]
            if not others or _mixes(node, found, others, learned):
                weights.update((result, leaves) for result in node.results if result is not None)
                if others or not mixed.isdisjoint(found):
                    mixed.update(result for result in node.results if result is not None)
            elif multiplies and any(len(value.shape) > 1 for value in others):
                matrices = [leaf for leaf in leaves if leaf.ndim > 1]
                if matrices:
                    self._weights[node] = matrices

    def locality(self, cut: Sequence[Mark], loss: Value) -> Locality:
        """How local the weights' updates are with states at these marks."""
        chains = self._chains(cut, loss)
        total = sum(leaf.numel() for leaf, _ in chains.values())
        if not total:
            return Locality(1.0, 1.0)
        mean = sum(leaf.numel() / length for leaf, length in chains.values()) / total
        share, none = (
            sum(leaf.numel() for leaf, length in chains.values() if length == which) / total for which in (1, math.inf)
        )
        return Locality(mean, share, none)

    def feeding(self) -> set[int]:
        """Identities of the leaves that flow into a product, or are its weights: all but what only scales losses."""
        needed: set[Value] = set()
        for node in reversed(self._nodes):
            if node in self._weights or any(result in needed for result in node.results):
                needed.update(node.values())
        return {id(leaf) for value, leaf in self._leaves.items() if value in needed}

    def matrices(self) -> set[int]:
        """Identities of the weights."""
        return {id(leaf) for leaves in self._weights.values() for leaf in leaves}

    def behind(self, cut: Sequence[Mark], loss: Value) -> set[int]:
        """Identities of the weights whose updates are propagated through others, or around the states."""
        return {key for key, (_, length) in self._chains(cut, loss).items() if length > 1}

    def after(self, cut: Sequence[Mark], loss: Value) -> set[StateKey]:
        """The states from which a way leads through a product to the loss, and through no other state."""
        states = {mark.state for mark in cut}
        met = {loss: False}
        for node in reversed(self._nodes):
            live = [r for r in node.results if r is not None and r in met and r not in states]
            if not live or is_by_shape(node.func):
                continue
            through = node in self._weights or any(met[r] for r in live)
            for value in node.values():
                if value.is_continuous:
                    met[value] = met.get(value, False) or through
        return {mark.key for mark in cut if met.get(mark.state)}

    def _chains(self, cut: Sequence[Mark], loss: Value) -> dict[int, tuple[Tensor, float]]:
        """Each weight, and the largest number of products, its own included, that its update goes through.

        Between it and a state or the loss, on a way that crosses no state; infinite for products that reach a state
        and, on another way, the loss, and for those that reach another use of the same weight, as through time.
        """
        states = {mark.state for mark in cut}
        after: dict[Value, int] = {loss: 0, **{mark.prediction: 0 for mark in cut}}
        heard: dict[Value, set[str | int]] = {loss: {"loss"}}
        for mark in cut:
            heard.setdefault(mark.prediction, set()).add("state")
        chains: dict[int, tuple[Tensor, float]] = {}
        for node in reversed(self._nodes):
            live = [r for r in node.results if r is not None and r in after and r not in states]
            if not live or is_by_shape(node.func):
                continue
            matrices = self._weights.get(node, [])
            length = max(after[r] for r in live) + bool(matrices)
            told = set[str | int]().union(*(heard[r] for r in live))
            around = {"loss", "state"} <= told
            for leaf in matrices:
                _, before = chains.get(id(leaf), (leaf, 0.0))
                chains[id(leaf)] = leaf, max(before, math.inf if around or id(leaf) in told else length)
            told.update(id(leaf) for leaf in matrices)
            for value in node.values():
                if value.is_continuous:
                    after[value] = max(after.get(value, 0), length)
                    heard.setdefault(value, set()).update(told)
        return chains


def self_gates(record: Record, marks: Iterable[Mark]) -> set[Mark]:
    """Calls whose results do nothing but multiply what they were computed from: x * g(x), as in squeeze-and-excite.

    Such a gate scales a layer; it is no layer of its own.
    """
    readers: defaultdict[Value, list[Node]] = defaultdict(list)
    for node in record.nodes:
        for value in node.values():
            readers[value].append(node)
    found = set()
    for mark in marks:
        factors = list(_factors(mark.state, readers))
        if factors and None not in factors and set(factors) <= _upstream(mark.prediction):
            found.add(mark)
    return found


def _factors(value: Value, readers: "defaultdict[Value, list[Node]]") -> Iterator[Value | None]:
    """What a value, reshaped or not, is multiplied by; None for any other use."""
    for node in readers[value]:
        results = [result for result in node.results if result is not None]
        if not is_operator(node.func):
            passes = node.func.__name__ == "stands_for"
        else:
            passes = traits(node.func).views or traits(node.func).name in ("clone", "_to_copy", "_unsafe_view")
        if passes:
            for result in results:
                yield from _factors(result, readers)
        elif is_operator(node.func) and traits(node.func).name == "mul":
            others = [other for other in node.values() if other is not value]
            yield from others
            if not others:
                yield None
        else:
            yield None


def _upstream(value: Value) -> set[Value]:
    seen: set[Value] = set()
    queue = [value]
    while queue:
        if (one := queue.pop()) not in seen:
            seen.add(one)
            queue.extend(one.node.values() if one.node is not None else ())
    return seen


def _is_number(value: Value) -> bool:
    return value.is_continuous and value.shape.numel() == 1


def _mixes(node: Node, weights: Sequence[Value], others: Sequence[Value], learned: set[Value]) -> bool:
    """Whether constants are put into a weight, which stays one: a mask, noise, what it was; or vectors, for its norm.

    Element by element the shape of the weight is kept. A gain has another shape than the samples that it scales.
    """
    if any(value in learned or not (value.is_continuous or value.meta[2] is torch.bool) for value in others):
        return False
    if is_operator(node.func) and torch.Tag.pointwise in node.func.tags:
        shapes = {value.shape for value in weights if len(value.shape) > 1}
        return all(result is None or result.shape in shapes for result in node.results)
    return all(len(value.shape) == 1 for value in others)


def _multiplies(node: Node) -> bool:
    """Whether features are mixed: no operation element by element, and none that only joins its arguments."""
    if not is_operator(node.func) or torch.Tag.pointwise in node.func.tags:
        return False
    given = [arg for arg in (*node.args, *node.kwargs.values()) if any(v.is_continuous for v in values_in(arg))]
    return len(given) > 1
