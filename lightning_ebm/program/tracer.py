"""The operations of one evaluation, written down below autograd while it runs."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.utils.weak import TensorWeakRef

from lightning_ebm.program.decompositions import DECOMPOSITIONS
from lightning_ebm.program.dispatch import DispatchMode
from lightning_ebm.program.operations import functional_form, tensors_at, traits
from lightning_ebm.program.schedule import note_size

_aten = torch.ops.aten
Evaluate = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""From a point, and what the batch fixed, to some tensors."""

_NEUTRAL = {_aten.mul.Tensor: 1, _aten.div.Tensor: 1, _aten.add.Tensor: 0, _aten.sub.Tensor: 0}
"""The second argument, by operation, with which it changes nothing."""
_FILLED = frozenset({"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"})
_MADE_UNIFORM = frozenset({_aten.full.default, _aten.ones.default, _aten.zeros.default, _aten.scalar_tensor.default})
_SPREADING = frozenset(
    {_aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.select.int, _aten.view.default}
    | {_aten.t.default, _aten.clone.default, _aten._unsafe_view.default, _aten.permute.default, _aten.transpose.int}
)
_SAME_VALUE = frozenset({_aten.detach.default, _aten.alias.default})


class _Negated(NamedTuple):
    """What was negated, and its `_kind`."""

    node: fx.Node
    kind: Any


class Tracer(DispatchMode):
    """Writes down the operations made while it is active, below autograd.

    It does what torch's `make_fx` does, in a hundredth of its time.

    An operation that has been made before, on the same tensors, is not written down again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, tuple[TensorWeakRef, fx.Node]] = {}
        self._made: dict[Any, fx.Node] = {}
        self._negative: dict[fx.Node, _Negated] = {}
        """What each negative is the negative of."""
        self._uniform: dict[fx.Node, complex] = {}
        """The number that all elements of a result are, where no input has a part in it."""

    def input(self, tensor: Tensor) -> None:
        """Makes a tensor an input of the graph."""
        self._bind(tensor, self.graph.placeholder(f"input_{len(self._nodes)}"))

    def node(self, tensor: Tensor) -> fx.Node:
        """What computed a tensor; a constant where nothing here did."""
        known = self._nodes.get(id(tensor))
        found = known[1] if known is not None and known[0].ref() is tensor else None
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
        self._nodes[id(tensor)] = TensorWeakRef(tensor), node
        note_size(node, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (other := DECOMPOSITIONS.get(func)) is not None:
            with self:
                made = other(*args, **kwargs)
            if made is not None:
                self.node(made).meta["in_place_of"] = func, self._seen(args), kwargs
                return made
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
        negated = self._negated_by(func, args)
        if (same := self._there_already(func, args, result, negated)) is not None:
            self._bind(result, same)
            return result
        if traits(func).name in _FILLED and isinstance(result, Tensor) and result.is_contiguous():
            func, args, kwargs = _filled(func, args, result)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        single = isinstance(result, Tensor)
        uniform = single and result.numel() > 0 and not kind.random and self._is_uniform(func, tensors)
        if single and not uniform and torch.Tag.pointwise in func.tags:
            args = tuple(self._as_number(arg, result, tensors) if isinstance(arg, Tensor) else arg for arg in args)
        copies = kind.name == "clone" and args[0].stride() == result.stride()  # for memory of its own, not for strides
        args, kwargs = self._seen(args), {name: self._seen((arg,))[0] for name, arg in kwargs.items()}
        node = self._written(func, args, kwargs, again=kind.random or copies)
        if uniform:
            self._uniform[node] = result[(0,) * result.ndim].item()
        self._bind_results(func, node, result)
        if negated is not None:
            self._negative[node] = _Negated(self.node(negated), _kind(negated))
        return result

    def _bind_results(self, func: Any, node: fx.Node, result: Any) -> None:
        if isinstance(result, list | tuple):
            node.meta["nested" if any(isinstance(part, list | tuple) for part in result) else "several"] = True
            for index, part in enumerate(result):
                if isinstance(part, Tensor | list | tuple):
                    key = key_of(operator.getitem, (node, index))
                    if key not in self._made:  # else another call gave the same results
                        self._made[key] = self.graph.call_function(operator.getitem, (node, index))
                    self._bind_results(func, self._made[key], part)
        elif isinstance(result, Tensor):
            self._bind(result, node)
        elif node.all_input_nodes:
            raise NotImplementedError(f"{func} gives a number that code could depend on")

    def _there_already(self, func: Any, args: tuple[Any, ...], result: Any, negated: Tensor | None) -> fx.Node | None:
        """What has the same value: what is multiplied by 1, turned round twice, or negated twice."""
        if (same := self._unchanged(func, args, result)) is not None:
            return self.node(same)
        if func is _aten.t.default and (turned := self.node(args[0])).target is func:
            return turned.all_input_nodes[0]
        back = None if negated is None else self._negative.get(self.node(negated))
        return None if back is None or back.kind != _kind(result) else back.node

    def _unchanged(self, func: Any, args: tuple[Any, ...], result: Any) -> Tensor | None:
        """The argument that an operation only hands on: a product with 1, a sum with 0."""
        neutral = _NEUTRAL.get(func)
        if neutral is None:
            return None
        orders = [args[:2]] if func in (_aten.div.Tensor, _aten.sub.Tensor) else [args[:2], args[1::-1]]
        for kept, other in orders:
            if self._is(other, neutral) and isinstance(kept, Tensor) and _kind(kept) == _kind(result):
                return kept
        return None

    def _negated_by(self, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """The argument of which an operation gives the negative."""
        if func is _aten.neg.default:
            return cast(Tensor, args[0])
        if func is _aten.mul.Tensor:
            for kept, other in (args[:2], args[1::-1]):
                if self._is(other, -1) and isinstance(kept, Tensor):
                    return kept
        return None

    def _is(self, argument: Any, number: int) -> bool:
        """Whether it is that number, or a tensor all of whose elements are."""
        found = self._uniform.get(self.node(argument)) if isinstance(argument, Tensor) else argument
        return type(found) in (int, float) and found == number

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

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], again: bool = False) -> fx.Node:
        """An operation of the graph: the one that is there already if it computes the same, or, `again`, a new one."""
        kind = traits(func)
        # What a call is asked for (its last argument, where there is one) two calls may ask of one.
        what, asked = (args[:-1], args[-1]) if kind.asked and not kwargs else (args, ())
        key = None if again else key_of(func, (*what, *kwargs.items()))
        node = None if key is None else self._made.get(key)
        if node is not None and asked:
            before: Any = node.args[-1]
            node.args = (*what, tuple(map(operator.or_, before, asked)))
        if node is None:
            node = self.graph.call_function(func, args, kwargs)
            if key is not None:
                self._made[key] = node
        return node

    def _seen(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            self.node(a) if isinstance(a, Tensor) else self._seen(a) if isinstance(a, list | tuple) else a for a in args
        )


def _filled(func: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A tensor of one number, whatever it is to be like, as `torch.full` makes it: (function, arguments, by name)."""
    if "full" in func.__name__:
        number = args[2 if func is _aten.new_full.default else 1]
    else:
        number = int("ones" in func.__name__)
    return _aten.full.default, (tuple(result.shape), number), {"dtype": result.dtype, "device": result.device}


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


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
    without_dead_code(tracer.graph)
    return Traced(tracer.graph, tracer.constants), [tensor.detach() for tensor in outputs]


def without_dead_code(graph: fx.Graph) -> None:
    """Erases what no output needs; also what could draw, as what is drawn is given: torch.fx would keep attention."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def key_of(func: Any, args: tuple[Any, ...]) -> Any:
    """What operations are looked up by; None for what cannot be."""
    key = (id(func), repr([type(a).__name__ for a in args]), args)
    try:
        hash(key)
    except TypeError:
        return None
    return key
