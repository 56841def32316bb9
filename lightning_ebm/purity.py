"""Only the user's own pass may have side effects; this file undoes those of a quiet one.

A quiet pass is run where the free equilibrium is not the forward pass, and for gradients that leave no trace. A
`Snapshot` is what the user's pass starts from; inside `replaying` the module, the random generators and its metrics are
as they were then, and on the way out (an exception too, KeyboardInterrupt included) as they had been before.

Covered: buffers (BatchNorm, spectral norm, any other), parameters that the user's code writes to (averaged teachers),
`requires_grad`, plain Python state of the user's own modules and of the objects they hold (see `PlainState`),
torchmetrics objects, the generators of torch (CPU and CUDA), Python and NumPy, global ones and those that modules hold.
Not covered: files, sockets, globals, objects that do not hang on the module. Forward hooks of the user's run in every
pass, as the passes are real ones; what they write to the module is undone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lightning_ebm.plain_state import PlainState, RandomState
from lightning_ebm.tree import modules_of, parameters_of


class Snapshot:
    """What a pass starts from, read when the first one is about to begin.

    Args:
        module: the user's module; everything below it is covered.
        tensors: paths of the buffers and parameters that a pass is known to write to; None copies all of them, to find
            out, or to be safe.
    """

    def __init__(self, module: nn.Module, tensors: frozenset[str] | None = None) -> None:
        self._module = module
        self._wanted = tensors
        self._is_taken = False

    def _take(self) -> None:
        self._is_taken = True
        self._tensors = _copies(self._module, self._wanted)
        modules = modules_of(self._module)
        self._trainable = [(p, p.requires_grad) for p in parameters_of(modules)]
        self._random = RandomState(self._module)
        self._plain = PlainState(self._module)
        self._metrics = [MetricTape(m) for m in _outermost_metrics(modules)]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The first pass: metrics work as ever, and what they return is noted for the others."""
        if not self._is_taken:
            self._take()
        with ExitStack() as stack:
            for tape in self._metrics:
                stack.enter_context(tape.recording())
            yield

    @contextmanager
    def replaying(self, written: frozenset[str] | None = frozenset()) -> Iterator[Callable[[], frozenset[str]]]:
        """A further pass: it starts from the snapshot and leaves no trace.

        Args:
            written: paths of tensors that the pass may write to, in addition to those in the snapshot; they start from
                their values of now. None is all.

        Yields:
            Tells the paths of the protected tensors that the pass has written to so far.
        """
        there = not self._is_taken  # reading and setting generators is most of what this costs
        if there:
            self._take()
        unknown = None if written is None else written - self._tensors.keys()
        with ExitStack() as stack:
            stack.callback((self._random if there else self._random.of_now()).restore)
            if not there:
                self._random.restore()
            tensors = _copies(self._module, unknown) | self._tensors
            for owner, name, value in tensors.values():
                stack.callback(_swapped(owner, name, value.clone()))
            trainable = self._trainable if there else [(p, p.requires_grad) for p, _ in self._trainable]
            stack.callback(_set_trainable, trainable)
            stack.callback((self._plain if there else self._plain.of_now()).restore)
            if not there:
                _set_trainable(self._trainable)
                self._plain.restore()
            for tape in self._metrics:
                stack.enter_context(tape.replaying())
            yield partial(_changed, tensors)


_Tensors = dict[str, tuple[nn.Module, str, Tensor]]


def _changed(tensors: _Tensors) -> frozenset[str]:
    """By value: version counters would not tell, BatchNorm bumps none."""
    return frozenset(
        path
        for path, (owner, name, value) in tensors.items()
        if (now := _held(owner, name)) is None or not torch.equal(now, value)
    )


def _set_trainable(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trainable in flags:
        if parameter.requires_grad != trainable:
            parameter.requires_grad_(trainable)


def _copies(module: nn.Module, wanted: frozenset[str] | None) -> _Tensors:
    if wanted is None:
        held = ((path, (*owner._buffers.items(), *owner._parameters.items())) for path, owner in module.named_modules())
        wanted = frozenset(f"{path}.{name}" for path, tensors in held for name, _ in tensors)
    copies: _Tensors = {}
    for path in sorted(wanted):
        prefix, _, name = path.rpartition(".")
        try:
            owner = module.get_submodule(prefix)
        except AttributeError:  # made by an earlier step, and gone
            continue
        if (tensor := _held(owner, name)) is not None:
            copies[path] = owner, name, tensor.detach().clone()
    return copies


def _held(owner: nn.Module, name: str) -> Tensor | None:
    return owner._buffers[name] if name in owner._buffers else owner._parameters[name]


def _swapped(owner: nn.Module, name: str, value: Tensor) -> Callable[[], None]:
    """Puts another tensor in place, not other contents: graphs of earlier passes keep the one they saved."""
    if name in owner._buffers:
        before = owner._buffers[name]
        owner._buffers[name] = value
        return partial(owner._buffers.__setitem__, name, before)
    parameter = owner._parameters[name]
    assert parameter is not None
    storage = parameter.data
    parameter.data = value
    return partial(setattr, parameter, "data", storage)


def _outermost_metrics(modules: Sequence[nn.Module]) -> list[nn.Module]:
    metrics = [m for m in modules if isinstance(m, (Metric, MetricCollection))]
    inside = {id(child) for m in metrics for child in m.modules() if child is not m}
    return [m for m in metrics if id(m) not in inside]


class MetricTape:
    """One torchmetrics object (with the metrics inside it): what its calls returned in the first pass, to return again.

    A value with a gradient is a loss, or a part of one, and is computed again, at the states of the further pass. For
    that, and before a first pass has been recorded, the metric works on a state that is thrown away. `update` and
    `compute` are instance attributes that torchmetrics wraps for its counting; they are put back as the very objects
    they were.
    """

    _METHODS = ("forward", "compute", "update", "reset")

    def __init__(self, metric: nn.Module) -> None:
        self._metric = metric
        self._recorded = False
        self._depth = 0
        self._returned: dict[tuple[int, str], list[Any]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._recorded = True
        with _replaced(_metrics_in(self._metric), self._noting, ("forward", "compute")):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        metrics = _metrics_in(self._metric)
        own = [dict(vars(metric)) for metric in metrics]
        if not self._recorded:
            with _aside(metrics, own):
                yield
            return
        again = partial(_aside, metrics, own)
        position = dict.fromkeys(self._returned, 0)
        with _replaced(metrics, partial(self._returning, position, again), self._METHODS):
            yield

    def _noting(self, metric: nn.Module, name: str) -> Callable[..., Any]:
        original = getattr(metric, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                value = original(*args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth:  # those that metrics make of each other are not made again
                noted = _Differentiable if name == "forward" and _has_gradient(value) else value
                self._returned.setdefault((id(metric), name), []).append(noted)
            return value

        return call

    def _returning(
        self,
        position: dict[tuple[int, str], int],
        again: Callable[[], AbstractContextManager[None]],
        metric: nn.Module,
        name: str,
    ) -> Callable[..., Any]:
        key = (id(metric), name)
        original = getattr(metric, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            values = self._returned.get(key)
            if not values:  # update and reset return nothing
                return None
            index = position[key]
            position[key] = index + 1
            value = values[min(index, len(values) - 1)]
            if value is not _Differentiable:
                return value
            with again():
                return original(*args, **kwargs)

        return call


def _metrics_in(metric: nn.Module) -> list[nn.Module]:
    return [m for m in metric.modules() if isinstance(m, Metric | MetricCollection)]


class _Differentiable:
    """Noted in place of a value with a gradient, whose graph is that of the first pass and not held here."""


def _has_gradient(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value))


@contextmanager
def _aside(metrics: Sequence[nn.Module], own: Sequence[dict[str, Any]]) -> Iterator[None]:
    """The metrics with the attributes given, on states that are thrown away.

    Args:
        metrics: which.
        own: the attributes of each, methods that stand in for its own left out.
    """
    with ExitStack() as stack:
        for metric, attributes in zip(metrics, own, strict=True):
            stack.callback(_reset, metric, dict(vars(metric)))
            states = {name: _fresh(attributes[name]) for name in getattr(metric, "_defaults", ()) if name in attributes}
            _reset(metric, attributes | states)
        yield


def _reset(metric: nn.Module, attributes: dict[str, Any]) -> None:
    vars(metric).clear()
    vars(metric).update(attributes)


def _fresh(state: Any) -> Any:
    """A metric's state that may be written to: a tensor, or a list of tensors."""
    return state.detach().clone() if isinstance(state, Tensor) else list(state) if isinstance(state, list) else state


@contextmanager
def _replaced(
    objects: Sequence[nn.Module], instead: Callable[[nn.Module, str], Callable[..., Any]], names: Sequence[str]
) -> Iterator[None]:
    with ExitStack() as stack:
        for held in objects:
            stack.enter_context(shadowed(held, {name: instead(held, name) for name in names}))
        yield


@contextmanager
def shadowed(held: object, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Shadows methods by instance attributes, and puts back exactly what the instance held before."""
    before = {name: held.__dict__[name] for name in methods if name in held.__dict__}
    held.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            held.__dict__.pop(name, None)
        held.__dict__.update(before)
