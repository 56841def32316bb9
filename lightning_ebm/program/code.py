"""Straight-line code for one evaluation of a program: traced once, by torch's own means, and run at every point.

The evaluation itself, energies, gradients and all, is what the plain way computes with autograd; a `Tracer` writes down
the operations that this comes to. What does not depend on the point is sorted into a first stage, which runs once for
every batch, less what the user's own pass has computed already.
"""

import gc
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.record import Node, Value, depending, stands_for
from lightning_ebm.program.schedule import sparing
from lightning_ebm.program.stage import Stage, module_of
from lightning_ebm.program.tensors import largest
from lightning_ebm.program.tracer import Evaluate, Traced, key_of, traced_graph, without_dead_code

log = logging.getLogger(__name__)

_aten = torch.ops.aten


class Code:
    """An evaluation as two pieces of code: once a batch, and at every point.

    Args:
        evaluate: what to trace.
        point: tensors like those it will be run at.
        given: what the batch fixed.
        known: finds the operations that the user's own pass has made, and the values that they gave.
        held: what a value held in the user's pass, if that is still there.
        compile: send the code through Inductor.
        takes: whether nobody else holds the point while it runs.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        point: Sequence[Tensor],
        given: Sequence[Tensor],
        known: Callable[[fx.Graph, list[fx.Node]], dict[fx.Node, Value]],
        held: Callable[[Value], Tensor | None],
        compile: bool,
        takes: bool = False,
    ) -> None:
        traced, expected = traced_graph(evaluate, point, given)
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"][len(point) :]
        found = known(traced.graph, inputs)
        self.recalled: list[Value] = []
        with traced.graph.inserting_before(next(n for n in traced.graph.nodes if n.op != "placeholder")):
            for node, value in found.items():
                if node.op != "placeholder" and held(value) is not None:
                    node.replace_all_uses_with(traced.graph.placeholder(f"recalled_{len(self.recalled)}"))
                    self.recalled.append(value)
        without_dead_code(traced.graph)
        recalled = [node for node in traced.graph.nodes if node.name.startswith("recalled_")]
        self.recalled = [value for value, node in zip(self.recalled, recalled, strict=True) if node.users]
        for node in recalled:
            if not node.users:
                traced.graph.erase_node(node)
        once, later = _stages(traced, len(point), takes)
        self._once = Stage(once, traced.constants)
        run = _compiled(later, traced.constants, [*point, *self.before(given, held)]) if compile else None
        self._point: Run = Stage(later, traced.constants) if run is None else run
        room = (1e-2 if compile else 1e-5) * max(map(largest, expected), default=0.0)  # Inductor rounds in other places
        for got, wanted in zip(self.at([*point, *self.before(given, held)]), expected, strict=True):
            if not torch.allclose(got, wanted, rtol=0.0, atol=room, equal_nan=True):
                raise NotImplementedError("the code gives other values than what it was traced from")

    @torch.no_grad()
    def before(self, given: Sequence[Tensor], held: Callable[[Value], Tensor | None]) -> list[Tensor]:
        """What every point needs of a batch."""
        recalled = [tensor for value in self.recalled if (tensor := held(value)) is not None]
        return list(self._once([*given, *recalled]))

    def at(self, inputs: list[Tensor]) -> list[Tensor]:
        """The evaluation at a point.

        Args:
            inputs: the point, and what `before` gave. The list is emptied, so that what nobody else holds can go.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return list(self._point(inputs))
        return list(self._point(inputs))


Run = Callable[[list[Tensor]], Any]


def _stages(traced: Traced, point: int, takes: bool) -> tuple[fx.Graph, fx.Graph]:
    """What does not depend on the first inputs, as a function of the others; and the rest."""
    nodes = list(traced.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    (end,) = (node for node in nodes if node.op == "output")
    moving: set[fx.Node] = set(inputs[:point])
    for node in nodes:
        if node is not end and any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    needed = [source for node in nodes if node in moving or node is end for source in node.all_input_nodes]
    boundary = list(dict.fromkeys(source for source in needed if source not in moving))
    once, later = fx.Graph(), traced.graph
    here: dict[fx.Node, fx.Node] = {node: once.placeholder(node.name) for node in inputs[point:]}
    for node in nodes:
        if node not in moving and node is not end and node not in here:
            here[node] = once.node_copy(node, here.__getitem__)
    once.output(tuple(here[node] for node in boundary))
    without_dead_code(once)
    # The rest stays in its graph, as copies of nodes are what takes long.
    first = next(node for node in nodes if node.op != "placeholder")
    own = [node for node in nodes if node in moving and node.op != "placeholder"]
    order = sparing(own, inputs[:point] if takes else (), end)
    for node in boundary:
        with later.inserting_before(first):
            node.replace_all_uses_with(later.placeholder(node.name))
    for node in reversed(nodes):
        if node not in moving and node is not end:
            later.erase_node(node)
    for node in order:
        end.prepend(node)
    return once, later


def _without_alpha(graph: fx.Graph) -> None:
    """Writes x + alpha y as two operations: Inductor loses alpha where y is a product of matrices."""
    for node in list(graph.nodes):
        if node.target in (_aten.add.Tensor, _aten.sub.Tensor) and (alpha := node.kwargs.get("alpha", 1)) != 1:
            with graph.inserting_before(node):
                scaled = graph.call_function(_aten.mul.Tensor, (node.args[1], alpha))
            node.args, node.kwargs = (node.args[0], scaled), {}


def _compiled(graph: fx.Graph, constants: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Run | None:
    _without_alpha(graph)
    try:
        run = torch._inductor.compile(module_of(graph, constants), list(inputs))
        return lambda inputs: run(*inputs)
    except Exception as error:  # no compiler, or an operation it does not have
        log.warning("Inductor could not compile a step, which runs as it was traced: %s", error)
        return None


@contextmanager
def all_kept() -> Iterator[None]:
    """Within it Python looks for no garbage: a graph in the making has none, and a quarter of the time was looking."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


Key = tuple[Any, ...]
Codes = dict[Key, "Code | str"]
"""Code by the evaluation and all that it depends on besides the program; or why there is none."""


class TracedProgram:
    """The code of one known program.

    Args:
        program: which it is traced from; its tensors are let go of.

    Attributes:
        values: what the batch fixes, in order.
        moving: values that depend on states.
        taught: by update, which leaves it has a slope in: others are read for their shape alone, and no optimizer may
            take a gradient of zero for one.
        refused: why there is no code, if there is none.
    """

    def __init__(self, program: Program) -> None:
        self.program = program.outline()
        self.values = program.given()
        self.codes: Codes = {}
        self.taught: dict[Key, list[bool]] = {}
        self.moving = depending({mark.state for mark in program.marks}, self.program.order)
        self._made = {key_of(node.func, self._canonical(node)): node for node in self.program.order}
        self.refused = program.not_traceable()

    def needed(self) -> set[Value]:
        """What code recalls of the user's pass."""
        return {value for code in self.codes.values() if isinstance(code, Code) for value in code.recalled}

    def _canonical(self, node: Node) -> tuple[Any, ...]:
        """The arguments, with predictions in the place of states: so they are in the user's pass."""

        def of(arg: Any) -> Any:
            if type(arg) is tuple:
                return tuple([of(a) for a in arg])
            while type(arg) is Value and arg.node is not None and arg.node.func is stands_for:
                arg = arg.node.args[0]
            return arg

        given: tuple[Any, ...] = of(node.args)
        return (*given, of(tuple(node.kwargs.items()))) if node.kwargs else given

    def known(self, graph: fx.Graph, inputs: list[fx.Node]) -> dict[fx.Node, Value]:
        """The operations of a traced graph that the user's own pass has made, and the values that they gave."""
        found = dict(zip(inputs, self.values, strict=True))
        several: dict[fx.Node, Node] = {}

        def of(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return found.get(arg, arg)
            if isinstance(arg, list | tuple):
                return tuple([of(a) for a in arg])
            return arg

        for fx_node in graph.nodes:
            if fx_node.op != "call_function":
                continue
            if fx_node.target is operator.getitem and fx_node.args[0] in several:
                value = several[fx_node.args[0]].results[fx_node.args[1]]
                if value is not None:
                    found[fx_node] = value
                continue
            func, args, kwargs = fx_node.meta.get("in_place_of", (fx_node.target, fx_node.args, fx_node.kwargs))
            named = (of(tuple(kwargs.items())),) if kwargs else ()
            node = self._made.get(key_of(func, of(args) + named))
            if node is None or node.written or "nested" in fx_node.meta:
                continue
            if "several" in fx_node.meta:
                several[fx_node] = node
            elif node.results[0] is not None:
                found[fx_node] = node.results[0]
        return found
