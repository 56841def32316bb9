"""The graph between the cuts of one pass: which states, parameters and weighted modules feed which."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.substitution import Pass, StateKey, WeightedOutput, clean, is_activation


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
    """Which calls carry states in passes whose sequence of candidate calls is `calls`.

    Attributes:
        candidates: modules to watch, and their names.
        calls: every call of theirs, in order, with a state or not.
        states: the calls that carry a state, in order.
        copies: the states that the user's code writes to in place: they are handed out as copies.
        rows: one a state.
        loss_parents: indices of the states the loss is computed from directly.
        loss_parameters: names of the parameters between those states and the loss, or in the loss itself.
        around: weighted modules that reach a state and also, around it, the loss.
        reached: names of all parameters that backprop would reach.
        written: paths of the buffers and parameters that a pass writes to.
    """

    candidates: Mapping[nn.Module, str]
    calls: tuple[StateKey, ...]
    states: tuple[StateKey, ...]
    copies: frozenset[StateKey]
    rows: tuple[Row, ...]
    loss_parents: tuple[int, ...]
    loss_parameters: tuple[str, ...]
    around: tuple[str, ...]
    reached: frozenset[str]
    written: frozenset[str] = frozenset()

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


class Wiring:
    """The graph between the cuts of one pass."""

    def __init__(self, module: nn.Module, observed: Pass) -> None:
        self._pass = observed
        self._parameters = {id(p): clean(name) for name, p in module.named_parameters()}
        self._order = {name: index for index, name in enumerate(self._parameters.values())}
        self._owners = {id(p): clean(name) for name, m in module.named_modules() for p in m.parameters(recurse=False)}
        self._state_index = {id(call.state): k for k, call in enumerate(observed.calls) if call.state is not None}
        self._above_loss = Region([observed.loss])
        self._above = [Region([call.prediction]) for call in observed.calls]

    def _parents(self, region: "Region") -> tuple[int, ...]:
        return tuple(sorted(self._state_index[i] for i in region.leaves if i in self._state_index))

    def _names(self, region: "Region") -> tuple[str, ...]:
        names = {
            self._parameters[i] for i, leaf in region.leaves.items() if i in self._parameters and leaf.requires_grad
        }
        return tuple(sorted(names, key=self._order.__getitem__))

    def _modules(self, region: "Region") -> set[str]:
        """The modules that own the trainable parameters in it."""
        return {self._owners[i] for i, leaf in region.leaves.items() if i in self._owners and leaf.requires_grad}

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
        """Calls the loss depends on and trainable parameters feed; the others are constants or inputs, not layers."""
        fed: set[int] = set()
        for k, region in enumerate(self._above):  # in the order of the calls, so parents come first
            if self._names(region) or fed & set(self._parents(region)):
                fed.add(k)
        return {self._pass.calls[k].key for k in self._live() & fed}

    def why_not(self, names: Iterable[str], states: Set[StateKey]) -> dict[str, str]:
        """Why each of these modules carries no state in any of its calls; without those that carry one."""
        carrying = {key.name for key in states}
        useful = {key.name for key in self.useful()}
        live = {self._pass.calls[k].key.name for k in self._live()}
        called = {call.key.name for call in self._pass.calls}
        return {
            name: "it was not called in this pass, or returned no floating-point tensor"
            if name not in called
            else "the loss does not depend on what it returns"
            if name not in live
            else "no trainable parameter feeds it, so that its output is an input of the network and nothing to predict"
            if name not in useful
            else 'it is the read-out, which enters the loss directly unless output="state"'
            for name in names
            if name not in carrying
        }

    def ends(self, but_activations: bool = False) -> set[StateKey]:
        """Calls whose states enter the loss with no weighted module, and no other layer, after them."""
        weighted = self._pass.weighted
        stops = {node for output in weighted for node in output.nodes}
        direct = set(self._parents(Region([self._pass.loss], stops)))
        feeding = {parent for region in self._above for parent in self._parents(region)}
        # A hidden state that a penalty takes into the loss as well still feeds its weighted successor.
        after = Region([output.tensor for output in weighted if output.nodes & self._above_loss.nodes])
        ends = [self._pass.calls[k] for k in direct - feeding - set(self._parents(after))]
        return {call.key for call in ends if not (but_activations and is_activation(call.module))}

    def heads(self) -> list[WeightedOutput]:
        """Calls of weighted modules whose outputs enter the loss with no weighted module after them."""
        weighted = [output for output in self._pass.weighted if output.trainable]
        hit = Region([self._pass.loss], {node for output in weighted for node in output.nodes}).stopped
        return [output for output in weighted if output.nodes & hit]

    def plan(self, candidates: Mapping[nn.Module, str]) -> Plan:
        calls = self._pass.calls
        index = {k: i for i, k in enumerate(k for k, call in enumerate(calls) if call.state is not None)}

        def parents(region: Region) -> tuple[int, ...]:
            return tuple(index[k] for k in self._parents(region))

        rows = []
        for k in index:
            call, region = calls[k], self._above[k]
            names = self._names(region)
            rows.append(
                Row(
                    call.key,
                    tuple(call.prediction.shape),
                    type(call.module).__name__ if is_activation(call.module) else None,
                    names,
                    len(self._modules(region)),
                    parents(region),
                )
            )
        inside = set().union(*(self._modules(self._above[k]) for k in index))
        reached = set(self._names(self._above_loss)).union(*(row.parameters for row in rows))
        return Plan(
            candidates=candidates,
            calls=self._pass.keys,
            states=tuple(calls[k].key for k in index),
            copies=frozenset(calls[k].key for k in index if calls[k].written),
            rows=tuple(rows),
            loss_parents=parents(self._above_loss),
            loss_parameters=self._names(self._above_loss),
            around=tuple(sorted(self._modules(self._above_loss) & inside)),
            reached=frozenset(reached),
        )


class Region:
    """Everything a tensor was computed from, back to leaves and to the given stops."""

    def __init__(self, tensors: Iterable[Tensor], stops: Iterable[Any] = ()) -> None:
        self.leaves: dict[int, Tensor] = {}
        self.nodes: set[Any] = set()
        self.stopped: set[Any] = set()
        stop = set(stops)
        queue: list[Any] = []
        for tensor in tensors:
            if tensor.grad_fn is not None:
                queue.append(tensor.grad_fn)
            elif tensor.requires_grad:
                self.leaves[id(tensor)] = tensor
        self._walk(queue, stop)

    @classmethod
    def below(cls, node: Any) -> "Region":
        """The same of a node of the graph, itself included."""
        region = cls([])
        region._walk([node], set())
        return region

    def _walk(self, queue: list[Any], stop: set[Any]) -> None:
        while queue:
            node = queue.pop()
            if node in self.nodes:
                continue
            self.nodes.add(node)
            if node in stop:
                self.stopped.add(node)
            elif (leaf := getattr(node, "variable", None)) is not None:
                self.leaves[id(leaf)] = leaf
            else:
                queue.extend(n for n, _ in node.next_functions if n is not None)


def sum_of_ends(observed: Pass) -> Tensor:
    """The sum of all that the pass computed and used for nothing further: in place of a loss, to find the wiring by."""
    stated = {call.key for call in observed.calls if call.state is not None}
    tensors = [output.tensor for output in observed.weighted if output.key not in stated]
    tensors += [call.prediction for call in observed.calls if call.state is None]
    states = [call.state for call in observed.calls if call.state is not None]
    # A module that returns what a part of it does is no further end.
    tensors = list({id(tensor.grad_fn or tensor): tensor for tensor in tensors}.values())
    regions = [Region([t]) for t in tensors] + [Region([c.prediction]) for c in observed.calls if c.state is not None]
    used = {leaf for region in regions for leaf in region.leaves}
    ends = [state for state in states if id(state) not in used]
    for tensor in tensors:
        others = (r for r in regions if tensor.grad_fn is not None and tensor.grad_fn in r.nodes)
        if tensor.requires_grad and sum(1 for _ in others) == 1:  # its own region alone
            ends.append(tensor)
    if not ends:
        raise ConfigurationError(
            "Nothing that was computed here depends on trainable parameters or states: there is no free equilibrium to"
            " evaluate at."
        )
    return torch.stack([end.sum() for end in ends]).sum()


def reached_parameters(module: nn.Module, scalar: Tensor) -> frozenset[str]:
    """Names of the trainable parameters that a gradient of `scalar` would reach."""
    leaves = Region([scalar]).leaves
    return frozenset(clean(name) for name, p in module.named_parameters() if id(p) in leaves)


def named_gradients(module: nn.Module, scalar: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
    """d scalar / d theta for every trainable parameter it reaches, by the name the user knows."""
    named = {clean(name): p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigurationError(f"{type(module).__name__} has no trainable parameter: nothing could be learned.")
    found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True, retain_graph=retain_graph)
    return {name: g.detach() for name, g in zip(named, found, strict=True) if g is not None}
