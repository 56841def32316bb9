"""The graph between the states of one record: which states, parameters and weighted modules feed which."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from lightning_ebm.program.locality import Judged, Locality
from lightning_ebm.program.module_walk import clean, is_activation, modules_of, owners_of, parameters_of
from lightning_ebm.program.operations import is_by_shape
from lightning_ebm.program.record import Mark, Record, StateKey, Value


class Row(NamedTuple):
    """What discovery learned of one call that carries a state.

    Attributes:
        key: which call.
        state_shape: shape of the state, batch first.
        activation: name of the nonlinearity's class, or None for a whole block.
        parameters: names of the parameters in the drive, in the order of the module.
        modules_between: modules with parameters between the parents' states and this one; 1 is as local as can be.
        parents: indices of the states its drive is computed from; empty where only the input is.
    """

    key: StateKey
    state_shape: tuple[int, ...]
    activation: str | None
    parameters: tuple[str, ...]
    modules_between: int
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which calls of one recorded pass carry states, and what feeds them.

    Attributes:
        states: the calls that carry a state, in order.
        rows: one a state.
        loss_parents: indices of the states the loss is computed from directly.
        loss_parameters: names of the parameters between those states and the loss, or in the loss itself.
        around: weighted modules that reach a state and also, around it, the loss.
        reached: names of all parameters that backprop would reach.
        locality: of the updates of the weights.
        compared: the sets of modules among which the layers were chosen; empty where they were asked for.
        chosen: which of them.
    """

    states: tuple[StateKey, ...]
    rows: tuple[Row, ...]
    loss_parents: tuple[int, ...]
    loss_parameters: tuple[str, ...]
    around: tuple[str, ...]
    reached: frozenset[str]
    locality: Locality = Locality(1.0, 1.0)
    compared: tuple[Judged, ...] = ()
    chosen: str = "asked for"

    @cached_property
    def depths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of each state, how many lie on the longest way to it from the input (itself included), and above it."""
        below: list[int] = []
        above = [0] * len(self.rows)
        for row in self.rows:  # in the order of the calls: parents come first
            below.append(1 + max((below[p] for p in row.parents), default=0))
        for k in range(len(self.rows) - 1, -1, -1):
            for p in self.rows[k].parents:
                above[p] = max(above[p], above[k] + 1)
        return tuple(below), tuple(above)

    def parallel_calls(self) -> int:
        """The most calls of one module that carry states, none of which is computed from another of them."""
        found, below = Counter[str](), list[set[str]]()
        for row in self.rows:
            below.append(set().union(*(below[p] | {self.rows[p].key.name} for p in row.parents)))
            found[row.key.name] += 1
        repeated = {row.key.name for row, names in zip(self.rows, below, strict=True) if row.key.name in names}
        return max((count for name, count in found.items() if name not in repeated), default=1)


class Wiring:
    """The graph between the marks of a record.

    Args:
        module: the user's module.
        record: of its pass.
        marks: where the graph is cut.
        loss: what the pass returned.
    """

    def __init__(self, module: nn.Module, record: Record, marks: Sequence[Mark], loss: Value) -> None:
        self.marks = list(marks)
        self._names = {id(p): clean(name) for name, p in module.named_parameters()}
        self._order = {name: index for index, name in enumerate(self._names.values())}
        self._owners = {key: clean(name) for key, name in owners_of(module).items()}
        self._leaves = record.leaves
        self._inputs = record.inputs
        self._held = {id(p) for p in parameters_of(modules_of(module))}
        self._index = {mark.state: k for k, mark in enumerate(self.marks)}
        self._loss = loss
        self._weighted = [mark for mark in record.marks if mark.weighted and not self._hands_on(mark, record.marks)]
        self._above_loss = self._region([loss])
        self._above = [self._region([mark.prediction]) for mark in self.marks]

    def _region(self, values: Iterable[Value], stops: Collection[Value] = ()) -> "Region":
        return Region(values, self._index, self._leaves, stops)

    def _hands_on(self, mark: Mark, marks: Sequence[Mark]) -> bool:
        """Whether a call with parameters of its own returns what its parts did, and has used its own before them.

        So does a network that adds `self.position` to its input and returns what its head gives: no weight comes after
        the head. What a parametrization returns is a weight, and no such part.
        """
        if next(mark.module.children(), None) is None:
            return False
        prefix = f"{mark.key.name}." if mark.key.name else ""
        parts = {m.state for m in marks if m is not mark and _is_part(m.key.name, prefix)}
        if not parts:
            return False
        region = Region([mark.prediction], (), self._leaves, parts | self._index.keys())
        return bool(region.stopped) and region.stopped <= parts and not region.leaves

    def _parents(self, region: "Region") -> tuple[int, ...]:
        return tuple(sorted(self._index[value] for value in region.states))

    def _parameters(self, region: "Region") -> tuple[str, ...]:
        names = {self._names[id(leaf)] for leaf in region.leaves if id(leaf) in self._names}
        return tuple(sorted(names, key=self._order.__getitem__))

    def _modules(self, region: "Region") -> set[str]:
        """The modules that own the trainable parameters in it."""
        return {self._owners[id(leaf)] for leaf in region.leaves if id(leaf) in self._owners}

    def _live(self) -> set[int]:
        """States that the loss depends on."""
        live: set[int] = set()
        queue = list(self._parents(self._above_loss))
        while queue:
            if (k := queue.pop()) not in live:
                live.add(k)
                queue.extend(self._parents(self._above[k]))
        return live

    def useful(self) -> set[StateKey]:
        """Calls the loss depends on and trainable parameters feed; the others are constants or inputs, not layers.

        What a call returns as complex numbers is no state either: an energy is a function of real ones.
        """
        fed: set[int] = set()
        for k, region in enumerate(self._above):  # in the order of the calls, so parents come first
            if self._parameters(region) or fed & set(self._parents(region)):
                fed.add(k)
        return {self.marks[k].key for k in self._live() & fed if not self.marks[k].prediction.is_complex}

    def inputs(self) -> set[StateKey]:
        """Calls the loss depends on and no parameter feeds, trainable or frozen: what passes through them is data."""
        found: set[int] = set()
        for k, region in enumerate(self._above):
            given = all(
                value.node is not None or id(self._inputs.get(value)) not in self._held for value in region.values
            )
            if given and not self._parameters(region) and found.issuperset(self._parents(region)):
                found.add(k)
        return {self.marks[k].key for k in self._live() & found if not self.marks[k].prediction.is_complex}

    def why_not(self, names: Iterable[str], states: Set[StateKey]) -> dict[str, str]:
        """Why each of these modules carries no state in any of its calls; without those that carry one."""
        carrying = {key.name for key in states}
        useful = {key.name for key in self.useful()}
        live = {self.marks[k].key.name for k in self._live()}
        called = {mark.key.name for mark in self.marks}
        complex_ = {mark.key.name for mark in self.marks if mark.prediction.is_complex}
        return {
            name: "it was not called in this pass, or returned no floating-point tensor"
            if name not in called
            else "the loss does not depend on what it returns"
            if name not in live
            else "it returns complex numbers, and energies are functions of real states"
            if name in complex_
            else "no trainable parameter feeds it, so that its output is an input of the network and nothing to predict"
            if name not in useful
            else 'it is the read-out, which enters the loss directly unless output="state"'
            for name in names
            if name not in carrying
        }

    def ends(self, but_activations: bool = False) -> set[StateKey]:
        """Calls whose states enter the loss with no weighted module, and no other layer, after them."""
        outputs = [mark.state for mark in self._weighted]
        stops = set(outputs) - self._index.keys()
        direct = set(self._parents(self._region([self._loss], stops)))
        feeding = {parent for region in self._above for parent in self._parents(region)}
        # A hidden state that a penalty takes into the loss as well still feeds its weighted successor.
        reaching = [value for value in outputs if value in self._above_loss.values and value not in self._index]
        after = self._region([mark.prediction for mark in self._weighted if mark.state in set(reaching)])
        ends = [self.marks[k] for k in direct - feeding - set(self._parents(after))]
        return {mark.key for mark in ends if not (but_activations and is_activation(mark.module))}

    def heads(self) -> list[Mark]:
        """Calls of weighted modules whose outputs enter the loss with no weighted module after them."""
        trainable = [m for m in self._weighted if any(p.requires_grad for p in m.module.parameters(recurse=False))]
        hit = self._region([self._loss], {mark.state for mark in trainable} - self._index.keys()).stopped
        return [mark for mark in trainable if mark.state in hit and not mark.prediction.is_complex]

    def plan(self) -> Plan:
        """The plan with a state at every mark."""
        rows = []
        for mark, region in zip(self.marks, self._above, strict=True):
            activation = type(mark.module).__name__ if is_activation(mark.module) else None
            names, modules = self._parameters(region), len(self._modules(region))
            rows.append(Row(mark.key, tuple(mark.prediction.shape), activation, names, modules, self._parents(region)))
        inside = set().union(*(self._modules(region) for region in self._above))
        reached = set(self._parameters(self._above_loss)).union(*(row.parameters for row in rows))
        return Plan(
            states=tuple(mark.key for mark in self.marks),
            rows=tuple(rows),
            loss_parents=self._parents(self._above_loss),
            loss_parameters=self._parameters(self._above_loss),
            around=tuple(sorted(self._modules(self._above_loss) & inside)),
            reached=frozenset(reached),
        )


def _is_part(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and "parametrizations" not in name[len(prefix) :].split(".")


class Region:
    """Everything some values were computed from, as far as a slope goes, back to states, leaves and given stops.

    Attributes:
        states: the states met.
        leaves: the tensors met that autograd takes for leaves.
        values: all values met.
        stopped: the stops met.
    """

    def __init__(
        self,
        values: Iterable[Value],
        states: Collection[Value],
        leaves: "dict[Value, Tensor]",
        stops: Collection[Value] = (),
    ) -> None:
        self.states: set[Value] = set()
        self.leaves: list[Tensor] = []
        self.values: set[Value] = set()
        self.stopped: set[Value] = set()
        queue = list(values)
        while queue:
            value = queue.pop()
            if value in self.values or not value.is_continuous:
                continue
            self.values.add(value)
            if value in states:
                self.states.add(value)
            elif value in stops:
                self.stopped.add(value)
            elif value in leaves:
                self.leaves.append(leaves[value])
            elif value.node is not None and not is_by_shape(value.node.func):
                queue.extend(value.node.values())
