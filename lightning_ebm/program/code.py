"""Straight-line code for one evaluation of a program: traced once, by torch's own means, and run at every point.

The evaluation itself, energies, gradients and all, is what the plain way computes with autograd; a `Tracer` writes down
the operations that this comes to. What does not depend on the point is sorted into a first stage, which runs once for
every batch, less what the user's own pass has computed already.
"""

import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lightning_ebm.program.dispatch import DispatchMode
from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.operations import functional_form, tensors_at, traits
from lightning_ebm.program.record import Node, Value, depending, stands_for
from lightning_ebm.program.schedule import note_size, sparing
from lightning_ebm.program.stage import Stage

log = logging.getLogger(__name__)

_aten = torch.ops.aten
Evaluate = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""From a point, and what the batch fixed, to some tensors."""

_SCALING = frozenset({_aten.mul.Tensor, _aten.div.Tensor})
_FILLED = frozenset({"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"})
_MADE_UNIFORM = frozenset({_aten.full.default, _aten.ones.default, _aten.zeros.default, _aten.scalar_tensor.default})
_SPREADING = frozenset(
    {_aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.select.int, _aten.view.default}
    | {_aten.t.default, _aten.clone.default, _aten._unsafe_view.default, _aten.permute.default, _aten.transpose.int}
)
_SAME_VALUE = frozenset({_aten.detach.default, _aten.alias.default})


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
        traced.graph.eliminate_dead_code()
        recalled = [node for node in traced.graph.nodes if node.name.startswith("recalled_")]
        self.recalled = [value for value, node in zip(self.recalled, recalled, strict=True) if node.users]
        for node in recalled:
            if not node.users:
                traced.graph.erase_node(node)
        self._once, stage = _stages(traced, len(point), takes)
        self._point: Run = stage
        if compile:
            self._point = _compiled(stage, [*point, *self.before(given, held)])
        room = (1e-2 if compile else 1e-5) * max(map(_size, expected), default=0.0)  # Inductor rounds in other places
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


class Tracer(DispatchMode):
    """Writes down the operations made while it is active, below autograd.

    It does what torch's `make_fx` does, in a hundredth of its time.

    An operation that has been made before, on the same tensors, is not written down again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._made: dict[Any, fx.Node] = {}
        self._uniform: dict[fx.Node, complex] = {}
        """The number that all elements of a result are, where no input has a part in it."""

    def input(self, tensor: Tensor) -> None:
        """Makes a tensor an input of the graph."""
        self._bind(tensor, self.graph.placeholder(f"input_{len(self._nodes)}"))

    def node(self, tensor: Tensor) -> fx.Node:
        """What computed a tensor; a constant where nothing here did."""
        known = self._nodes.get(id(tensor))
        found = known[1] if known is not None and known[0]() is tensor else None
        if found is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor.detach()
            found = self.graph.get_attr(name)
            self._bind(tensor, found)
        return found

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether it was computed here, and nothing else lies in its memory."""
        if (known := self._nodes.get(id(tensor))) is None or known[1].op != "call_function":
            return False
        memory = tensor.untyped_storage().data_ptr()
        others = (ref() for ref, _ in self._nodes.values())
        return not any(o is not None and o is not tensor and o.untyped_storage().data_ptr() == memory for o in others)

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = weakref.ref(tensor), node
        note_size(node, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = traits(func)
        written = func
        if kind.writes and (tensors := tensors_at(kind, args, kwargs)):
            functional = functional_form(func, kind)
            if functional is None or not self._is_own(tensors[0]):  # one stage may make what another writes to
                raise NotImplementedError(f"{func} writes to a tensor")
            written = functional
        result = func(*args, **kwargs)
        if func in _SAME_VALUE:
            self._bind(result, self.node(args[0]))
            return result
        func = written
        if func in _SCALING and type(args[1]) in (int, float) and args[1] == 1 and result.dtype == args[0].dtype:
            self._bind(result, self.node(args[0]))
            return result
        if func is _aten.t.default and (turned := self.node(args[0])).target is func:  # turned round twice
            self._bind(result, turned.all_input_nodes[0])
            return result
        if (
            traits(func).name in _FILLED and isinstance(result, Tensor) and result.is_contiguous()
        ):  # whatever it is like
            filled = (
                args[1:][int(func is _aten.new_full.default)]
                if "full" in func.__name__
                else int("ones" in func.__name__)
            )
            func, args = _aten.full.default, (tuple(result.shape), filled)
            kwargs = {"dtype": result.dtype, "device": result.device}
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        single = isinstance(result, Tensor)
        uniform = single and result.numel() > 0 and not kind.random and self._is_uniform(func, tensors)
        if single and not uniform and torch.Tag.pointwise in func.tags:
            args = tuple(self._as_number(arg, result, tensors) if isinstance(arg, Tensor) else arg for arg in args)
        args, kwargs = self._seen(args), {name: self._seen((arg,))[0] for name, arg in kwargs.items()}
        node = self._written(func, args, kwargs)
        if isinstance(result, list | tuple):
            node.meta["several"] = True
            for index, tensor in enumerate(result):
                if isinstance(tensor, Tensor):
                    self._bind(tensor, self.graph.call_function(operator.getitem, (node, index)))
        elif isinstance(result, Tensor):
            self._bind(result, node)
            if uniform:
                self._uniform[node] = result[(0,) * result.ndim].item()
        elif any(isinstance(arg, fx.Node) for arg in (*args, *kwargs.values())):
            raise NotImplementedError(f"{func} gives a number that code could depend on")
        return result

    def _is_uniform(self, func: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether all elements are one number, whatever the inputs: made as such, or computed from such."""
        if not tensors:
            return func in _MADE_UNIFORM
        spreads = torch.Tag.pointwise in func.tags or func in _SPREADING
        return spreads and all(self.node(tensor) in self._uniform for tensor in tensors)

    def _as_number(self, tensor: Tensor, result: Tensor, among: Sequence[Tensor]) -> Tensor | fx.Node:
        """A large tensor of one number as that number, where neither strides nor dtype of the result hang on it."""
        node = self.node(tensor)
        shaped = any(t is not tensor and t.shape == result.shape and t.stride() == result.stride() for t in among)
        if node not in self._uniform or tensor.ndim == 0 or not shaped or any(t.dtype != result.dtype for t in among):
            return tensor
        options = {"dtype": tensor.dtype, "device": tensor.device}
        return self._written(_aten.full.default, ((), self._uniform[node]), options)

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """An operation of the graph; the one that is there already, if it computes the same."""
        kind = traits(func)
        key = None if kind.random or kind.name == "clone" else _key(func, (*args, *kwargs.items()))
        node = None if key is None else self._made.get(key)
        if node is None:
            node = self.graph.call_function(func, args, kwargs)
            if key is not None:
                self._made[key] = node
        return node

    def _seen(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            self.node(a) if isinstance(a, Tensor) else self._seen(a) if isinstance(a, list | tuple) else a for a in args
        )


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


class Traced(NamedTuple):
    """Operations, and the tensors among them that nothing of the inputs was computed into."""

    graph: fx.Graph
    constants: dict[str, Tensor]


def traced_graph(evaluate: Evaluate, point: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Traced, list[Tensor]]:
    """The operations of an evaluation, as a function of a point and of what the batch fixed; and what they gave."""
    tracer = Tracer()
    point, given = [x.detach() for x in point], [x.detach() for x in given]  # the same one twice is two inputs
    for tensor in (*point, *given):
        tracer.input(tensor)
    with torch.enable_grad(), tracer:
        outputs = evaluate(point, given)
    tracer.graph.output(tuple(tracer.node(tensor) for tensor in outputs))
    tracer.graph.eliminate_dead_code()
    return Traced(tracer.graph, tracer.constants), [tensor.detach() for tensor in outputs]


Run = Callable[[list[Tensor]], Any]


def _stages(traced: Traced, point: int, takes: bool) -> tuple[Stage, Stage]:
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
    once, later = fx.Graph(), fx.Graph()
    here: dict[fx.Node, fx.Node] = {node: once.placeholder(node.name) for node in inputs[point:]}
    for node in nodes:
        if node not in moving and node is not end and node not in here:
            here[node] = once.node_copy(node, here.__getitem__)
    once.output(tuple(here[node] for node in boundary))
    once.eliminate_dead_code()
    there = {node: later.placeholder(node.name) for node in [*inputs[:point], *boundary]}
    own = [node for node in nodes if node in moving and node not in there]
    for node in sparing(own, inputs[:point] if takes else (), end):
        there[node] = later.node_copy(node, there.__getitem__)
    later.output(fx.map_arg(end.args[0], there.__getitem__))
    return Stage(once, traced.constants), Stage(later, traced.constants)


def _without_alpha(graph: fx.Graph) -> None:
    """Writes x + alpha y as two operations: Inductor loses alpha where y is a product of matrices."""
    for node in list(graph.nodes):
        if node.target in (_aten.add.Tensor, _aten.sub.Tensor) and (alpha := node.kwargs.get("alpha", 1)) != 1:
            with graph.inserting_before(node):
                scaled = graph.call_function(_aten.mul.Tensor, (node.args[1], alpha))
            node.args, node.kwargs = (node.args[0], scaled), {}


def _compiled(stage: Stage, inputs: Sequence[Tensor]) -> Run:
    _without_alpha(stage.graph)
    try:
        run = torch._inductor.compile(stage.module(), list(inputs))
        return lambda inputs: run(*inputs)
    except Exception as error:  # no compiler, or an operation it does not have
        log.warning("Inductor could not compile a step, which runs as it was traced: %s", error)
        return stage


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
        refused: why there is no code, if there is none.
    """

    def __init__(self, program: Program) -> None:
        self.program = program.outline()
        self.values = program.given()
        self.codes: Codes = {}
        self.moving = depending({mark.state for mark in program.marks}, self.program.order)
        self._made = {_key(node.func, self._canonical(node)): node for node in self.program.order}
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
            named = (of(tuple(fx_node.kwargs.items())),) if fx_node.kwargs else ()
            node = self._made.get(_key(fx_node.target, of(fx_node.args) + named))
            if node is None or node.written:
                continue
            if "several" in fx_node.meta:
                several[fx_node] = node
            elif node.results[0] is not None:
                found[fx_node] = node.results[0]
        return found


def _key(func: Any, args: tuple[Any, ...]) -> Any:
    """What operations are looked up by; None for what cannot be."""
    key = (id(func), repr([type(a).__name__ for a in args]), args)
    try:
        hash(key)
    except TypeError:
        return None
    return key
