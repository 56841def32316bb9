"""Replacing what layers return by states, for one pass of the user's own code.

The only file that touches a user's modules. It does so with forward hooks, inside a context manager that removes them
whatever happens; the user's own hooks run as ever, before.
"""

import copy
import dataclasses
import itertools
import operator
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_ebm.energies import LayerView
from lightning_ebm.tree import modules_of, parameters_of


class StateKey(NamedTuple):
    """One state: the part-th tensor that the call-th call of a module returns. Single outputs have part 0."""

    name: str
    call: int
    part: int

    def __str__(self) -> str:
        suffix = f"#{self.call}" if self.call else ""
        return f"{self.name}{suffix}" + (f"[{self.part}]" if self.part else "")


@dataclass
class Call:
    """What one pass saw at one layer.

    Attributes:
        key: which call.
        module: the module called.
        drive: a_l; the prediction where the layer is a block.
        prediction: mu_l, in at least float32, with its graph down to the parents' states.
        state: x_l, a leaf in at least float32; None where the call carries no state.
    """

    key: StateKey
    module: nn.Module
    drive: Tensor
    prediction: Tensor
    state: Tensor | None = None
    handed_out: Tensor | None = None

    def view(self, above: int) -> LayerView:
        activation = None if self.drive is self.prediction else self.module
        return LayerView(self.key.name, self.key.call, self.drive, self.prediction, activation, above)

    @property
    def written(self) -> bool:
        """Whether the user's code wrote to the state it was given (an in-place activation or addition after it)."""
        return self.handed_out is not None and self.handed_out._version > 0


@dataclass
class WeightedOutput:
    """The output of a call of a module with parameters of its own; discovery finds the network's end by them."""

    key: StateKey
    module: nn.Module
    tensor: Tensor
    trainable: bool

    @property
    def nodes(self) -> set[Any]:
        return {self.tensor.grad_fn} if self.tensor.grad_fn is not None else set()


@dataclass
class Pass:
    """One run of the user's code with states in place.

    Attributes:
        calls: every call of a candidate, in the order in which they returned.
        loss: what the run returned, a scalar; set by whoever ran it.
        leading_sizes: first dimensions of what the module was called with, if it was.
        arguments: what it was called with first: the one positional argument, or all of them.
        weighted: outputs of all modules with parameters, when asked for.
        rounding: relative, of the arithmetic that the layers computed in, autocast or not.
    """

    calls: list[Call] = field(default_factory=list)
    loss: Any = None
    leading_sizes: list[int] = field(default_factory=list)
    arguments: Any = None
    weighted: list[WeightedOutput] = field(default_factory=list)
    rounding: float = 0.0

    @property
    def keys(self) -> tuple[StateKey, ...]:
        """Which calls, in order."""
        return tuple(call.key for call in self.calls)

    @property
    def layers(self) -> list[Call]:
        """The calls that carry a state."""
        return [call for call in self.calls if call.state is not None]

    @property
    def states(self) -> list[Tensor]:
        """x_l of every layer."""
        return [call.state for call in self.calls if call.state is not None]


StateOf = Callable[[StateKey, Tensor], Tensor | None]
"""Chooses x_l from the key and the prediction; None leaves the call alone."""


def at_prediction(keep: Container[StateKey] | None = None) -> StateOf:
    """x_l = mu_l, as a leaf, for the calls in `keep`; None is all."""
    return lambda key, mu: mu.detach().requires_grad_() if keep is None or key in keep else None


def at_states(states: Mapping[StateKey, Tensor]) -> StateOf:
    """x_l as given, as a leaf."""
    return lambda key, _: states[key].detach().requires_grad_() if key in states else None


@contextmanager
def substituted(
    root: nn.Module,
    candidates: Mapping[nn.Module, str],
    state_of: StateOf,
    copies: Callable[[StateKey], bool],
    find_weighted: bool = False,
) -> Iterator[Pass]:
    """Runs the body with every candidate's output replaced by the state chosen for it.

    Args:
        root: the user's module, for the batch size.
        candidates: the modules to watch, and their names.
        state_of: gives the state; it is handed on in the prediction's dtype.
        copies: whether this state must be handed out as a copy, because the user's code writes to it.
        find_weighted: note the outputs of all modules with parameters of their own, too.
    """
    observed = Pass()
    counts: dict[nn.Module, int] = {}
    untouched_drive: dict[nn.Module, Tensor] = {}

    def before_in_place(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in candidates and args and isinstance(args[0], Tensor):
            untouched_drive[module] = args[0].clone()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module not in candidates:  # a copy that was made in a way of its own, hooks and all
            return output
        number = counts.get(module, 0)
        counts[module] = number + 1
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        drive = untouched_drive.pop(module, inputs[0] if inputs and is_activation(module) else None)
        leaves, rebuild = _flattened(output)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _is_continuous(leaf)]
        for part, i in enumerate(tensors):
            key = StateKey(candidates[module], number, part)
            original = leaves[i]
            observed.rounding = max(observed.rounding, _rounding(original))
            prediction = at_least_float32(original)
            call = Call(key, module, prediction if drive is None else at_least_float32(drive), prediction)
            observed.calls.append(call)
            state = state_of(key, prediction)
            if state is not None:
                call.state = state
                narrower = state.dtype != original.dtype and not state.is_complex()
                call.handed_out = state.to(original.dtype) if narrower else state
                if call.handed_out is state and copies(key):
                    call.handed_out = state.clone()
                leaves[i] = call.handed_out
        return rebuild(leaves)

    def note_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not root:
            return
        observed.leading_sizes = observed.leading_sizes or leading_sizes((args, kwargs))
        if observed.arguments is None:
            observed.arguments = args[0] if len(args) == 1 and not kwargs else (args, kwargs)

    with ExitStack() as stack:

        def add(module: nn.Module, handle: RemovableHandle) -> None:
            stack.callback(handle.remove)
            stack.enter_context(_left_out_of_copies(module, handle.id))

        if find_weighted:
            for name, module in root.named_modules():
                if any(True for _ in module.parameters(recurse=False)):
                    add(module, module.register_forward_hook(_noting_weighted(observed, clean(name), module)))
        for module in candidates:
            if getattr(module, "inplace", False):
                add(module, module.register_forward_pre_hook(before_in_place))
            add(module, module.register_forward_hook(after, with_kwargs=True))
        add(root, root.register_forward_pre_hook(note_batch, with_kwargs=True))
        if any("_orig_mod" in module._modules for module in modules_of(root)):
            # A compiled network would not see the hooks: for these passes it runs as it was written.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield observed


def _flattened(output: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of what a module returned, and how to put others in their place. Dataclasses count as containers."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type | dict):
        names = [f.name for f in dataclasses.fields(output)]
        leaves, structure = pytree.tree_flatten([getattr(output, name) for name in names])

        def rebuild(others: list[Any]) -> Any:
            again = copy.copy(output)
            for name, value in zip(names, pytree.tree_unflatten(others, structure), strict=True):
                object.__setattr__(again, name, value)
            return again

        return leaves, rebuild
    if isinstance(output, Tensor):
        return [output], operator.itemgetter(0)
    leaves, structure = pytree.tree_flatten(output)
    return leaves, lambda others: pytree.tree_unflatten(others, structure)


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


@contextmanager
def _left_out_of_copies(module: nn.Module, hook: int) -> Iterator[None]:
    """Copies and pickles of the module that the user's code makes meanwhile are made without this hook.

    Copying asks an object for its state, where one hook less is all that differs. Several of these may be nested.
    """
    before = vars(module).get("__getstate__")
    state_of = getattr(module, "__getstate__", None) or (lambda: dict(vars(module)))  # objects have one from 3.11 on

    def state_without() -> Any:
        state = state_of()
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != "__getstate__"}
            for name in _HOOKS:
                if hook in state.get(name, ()):
                    state[name] = type(state[name])((k, v) for k, v in state[name].items() if k != hook)
        return state

    vars(module)["__getstate__"] = state_without
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("__getstate__", None)
        else:
            vars(module)["__getstate__"] = before


def _noting_weighted(observed: Pass, name: str, noted: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
    count = itertools.count()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if module is not noted:
            return
        number = next(count)
        tensors = [t for t in _flattened(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        for part, tensor in enumerate(tensors):
            key = StateKey(name, number, part)
            observed.weighted.append(WeightedOutput(key, module, tensor, trainable))

    return note


def at_least_float32(tensor: Tensor) -> Tensor:
    """States and energies live in float32 even where the network computes in less: phase differences would drown."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def is_activation(module: nn.Module) -> bool:
    """Whether a layer at this module is a nonlinearity of its drive, not a block with weights of its own."""
    return isinstance(module, nn.PReLU) or not parameters_of(modules_of(module))


def clean(name: str) -> str:
    """A parameter's or module's name as the user wrote the model, without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _rounding(tensor: Tensor) -> float:
    device = tensor.device.type
    computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
    return max(torch.finfo(tensor.dtype).eps, torch.finfo(computed_in).eps)


def leading_sizes(batch: Any) -> list[int]:
    """First dimension of every tensor in a batch, or in a call's arguments, that has one: candidates for B."""
    return [t.shape[0] for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim > 0]


def batch_size_among(candidates: list[int], shapes: list[torch.Size]) -> int:
    """The candidate that most states have among their first two dimensions, then the most frequent, then the first.

    A time-major batch (T, B, ...) or a loose tensor beside the samples is not mistaken for the batch size that way.
    """
    found = candidates or [size for shape in shapes for size in shape[:1]] or [1]
    carried = {size: sum(size in shape[:2] for shape in shapes) for size in found}
    return max(found, key=lambda size: (carried[size], found.count(size), -found.index(size)))
