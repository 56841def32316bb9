"""A pass that leaves no trace: whatever it does to the module is undone.

The user's step runs once, for real. Where it has to run besides (quietly, for energies whose free equilibrium is not
the forward pass; for `Learner.gradients`, the references and the layer table), it runs within `untouched`, and on the
way out (an exception too, KeyboardInterrupt included) all is as it was.

Covered: buffers (BatchNorm, spectral norm, any other), parameters that the user's code writes to (averaged teachers),
`requires_grad`, plain Python state of modules and of the objects they hold (see `PlainState`),
torchmetrics objects, the generators of torch (CPU and CUDA), Python and NumPy, global ones and those that modules hold.
A `Recorder`, or `Undoing`, besides puts back every tensor that a quiet pass writes to, wherever it is held. Not
covered: files, sockets, globals, objects that do not hang on the module. Forward hooks of the user's run, as the passes
are real ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torchmetrics import Metric, MetricCollection

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.plain_state import PlainState, RandomState
from lightning_ebm.program.module_walk import modules_of, parameters_of


@contextmanager
def untouched(module: nn.Module, tensors: bool = True) -> Iterator[None]:
    """Within it, what is done to a module and the generators is undone at the end.

    Args:
        module: the user's; everything below it is covered.
        tensors: whether its buffers and parameters are copied; False leaves them to somebody else.
    """
    modules = modules_of(module)
    metrics = [m for m in modules if isinstance(m, Metric | MetricCollection)]
    with ExitStack() as stack:
        stack.callback(RandomState(module).restore)
        if tensors:
            stack.enter_context(untouched_tensors(module))
        stack.callback(_set_trainable, [(p, p.requires_grad) for p in parameters_of(modules)])
        stack.callback(PlainState(module).restore)
        stack.enter_context(_aside(metrics, [dict(vars(metric)) for metric in metrics]))
        yield


def build(module: nn.Module, run: Callable[[], Any]) -> None:
    """Runs a pass of a module that its first batch builds, `nn.LazyLinear` and its kin, if it is not built yet.

    It stays built, by the numbers that were drawn first, and nothing else stays of the pass.
    """
    lazy = [m for m in modules_of(module) if isinstance(m, LazyModuleMixin) and m.has_uninitialized_params()]
    if not lazy:
        return
    with untouched(module), torch.enable_grad():
        run()
    for owner in lazy:
        if callable(reset := getattr(owner, "reset_running_stats", None)):  # as nn.LazyBatchNorm1d has one
            reset()


@contextmanager
def untouched_tensors(module: nn.Module) -> Iterator[None]:
    """Within it, what is written to buffers and parameters of a module is written to copies."""
    with ExitStack() as stack:
        for owner, name, value in _copies(module):
            stack.callback(_swapped(owner, name, value))
        yield


@contextmanager
def without_iterators(module: nn.Module) -> Iterator[None]:
    """Within it nobody draws from the iterators that modules hold, for passes that are run again.

    Nothing can be put back into an iterator. The next pass would see other items.
    """
    held = [
        (owner, f"{path}.{name}" if path else name, name, value)
        for path, owner in module.named_modules()
        for name, value in vars(owner).items()
        if isinstance(value, Iterator)
    ]
    for owner, path, name, _ in held:
        vars(owner)[name] = _Refusing(path)
    try:
        yield
    finally:
        for owner, _, name, value in held:
            if isinstance(vars(owner).get(name), _Refusing):
                vars(owner)[name] = value


class _Refusing(Iterator[Any]):
    """In the place of an iterator.

    Args:
        path: the attribute that holds it.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __next__(self) -> Any:
        raise UnsupportedModuleError(
            f"The step draws from an iterator that the module holds ({self._path!r}), and for this energy the step runs"
            " twice, quietly and at the free equilibrium: the second pass would get other items. Draw before"
            ' training_step (in on_train_batch_start), or take a divergence energy such as "predictive-coding".'
        )


def _set_trainable(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trainable in flags:
        if parameter.requires_grad != trainable:
            parameter.requires_grad_(trainable)


def _copies(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    held = [(owner, (*owner._buffers.items(), *owner._parameters.items())) for owner in modules_of(module)]
    return [
        (owner, name, tensor.detach().clone())
        for owner, tensors in held
        for name, tensor in tensors
        if tensor is not None and not is_lazy(tensor)
    ]


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
