"""Watching calls of modules while a pass is recorded: what they return is marked, and nothing is replaced.

One of the two files that touch a user's modules. It does so with forward hooks, inside a context manager that removes
them whatever happens; the user's own hooks run as ever, before.
"""

import copy
import dataclasses
import operator
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_ebm.program.aliasing import is_wrapped
from lightning_ebm.program.batch_size import declared_size, shapes_in
from lightning_ebm.program.fast_paths import FastPaths
from lightning_ebm.program.module_walk import modules_of, parameters_of
from lightning_ebm.program.record import Mark, StateKey, Value, is_continuous
from lightning_ebm.program.recorder import Recorder

Replace = Callable[[Mark, Tensor], Tensor | None]
"""Gives the state that is to stand for what a call returned; None leaves it alone."""


def nothing_in_place(mark: Mark, output: Tensor) -> None:
    """Leaves what every call returned."""


class Watch:
    """Which modules are watched: found anew only when the modules, or which of them hold parameters, have changed.

    Args:
        root: the user's module.
        chosen: the modules whose calls may carry states; those with parameters of their own are watched anyway.
    """

    def __init__(self, root: nn.Module, chosen: Callable[[], Collection[nn.Module]]) -> None:
        self._root = root
        self._find = chosen
        self._of: list[Any] = []
        self.chosen: Collection[nn.Module] = ()
        self.names: dict[nn.Module, str] = {}
        self.weighted: dict[nn.Module, bool] = {}
        self.activations: list[nn.Module] = []
        self.batch_first: dict[nn.Module, bool] = {}
        """What modules with torch's attribute of that name say: whether samples come before times."""
        self.encoders: list[nn.Module] = []
        self.fast_paths = FastPaths(root)
        self.compiled = False

    def renew(self) -> None:
        """Looks at the modules of now."""
        modules = modules_of(self._root)
        now = [(m, *m._modules.items(), *((name, p is None) for name, p in m._parameters.items())) for m in modules]
        if now == self._of:
            return
        self._of = now
        self.chosen = self._find()
        self.weighted = {module: _has_weights(module) for module in modules}
        named = [(module, name) for name, module in self._root.named_modules()]
        self.names = {
            module: clean(name)
            for module, name in named
            if (self.weighted[module] or module in self.chosen) and not isinstance(module, torch.jit.ScriptModule)
        }  # scripted ones take no hooks
        self.activations = [module for module in self.names if is_activation(module)]
        says = {module: getattr(module, "batch_first", None) for module in self.names}
        self.batch_first = {module: first for module, first in says.items() if isinstance(first, bool)}
        self.encoders = [module for module in modules if isinstance(module, nn.TransformerEncoder)]
        # A compiled network would not see the hooks: for a pass it runs as it was written.
        self.compiled = any("_orig_mod" in module._modules for module in modules)


def _has_weights(module: nn.Module) -> bool:
    """Whether it computes with parameters of its own: a norm without affine parameters has none."""
    return is_parametrized(module) or any(p is not None for p in module._parameters.values())


@contextmanager
def watched(root: nn.Module, recorder: Recorder, watch: Watch, replace: Replace) -> Iterator[None]:
    """Runs the body with calls of modules below `root` marked in a record.

    Args:
        root: the user's module, for the batch size.
        recorder: what records.
        watch: which modules.
        replace: for energies whose free equilibrium is not the forward pass, the states to hand out.
    """
    watch.renew()
    names, weighted, chosen = watch.names, watch.weighted, watch.chosen
    counts: dict[nn.Module, int] = {}
    drives: dict[nn.Module, Value] = {}
    thread = threading.get_ident()  # others may call the same modules meanwhile

    def marks_now() -> bool:
        return torch.is_grad_enabled() and not recorder.pausing.depth and threading.get_ident() == thread

    # What the record knows of a tensor is not asked of the tensor: under a mode of torch that takes microseconds.
    contents = recorder.contents

    def is_seen(tensor: Tensor) -> bool:
        return contents.known(tensor) is not None or not is_wrapped(tensor)

    def carries(leaf: Any) -> bool:
        if not isinstance(leaf, Tensor):
            return False
        known = contents.known(leaf)
        return is_continuous(leaf.dtype) if known is None else known.is_continuous

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        drive = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if module in names and drive is not None and marks_now() and is_seen(drive):
            drives[module] = contents.value(drive)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module not in names:  # a copy of a watched module took the hook along
            return output
        if threading.get_ident() != thread:
            return output
        number = counts.get(module, 0)
        counts[module] = number + 1
        drive = drives.pop(module, None)
        if not marks_now():
            return output
        if args and (size := declared_size(args[0], watch.batch_first.get(module))) is not None:
            recorder.record.declared.add(size)
        leaves, rebuild = flattened(output)
        replaced = False
        for part, i in enumerate([i for i, leaf in enumerate(leaves) if carries(leaf)]):
            tensor = leaves[i]
            if not is_seen(tensor):
                recorder.record.transformed = True
                continue
            if contents.known(tensor) is None and not tensor.requires_grad and module not in chosen:
                continue
            key = StateKey(names[module], number, part)
            mark = recorder.mark(key, module, drive, tensor, weighted[module])
            state = replace(mark, tensor)
            handed_on = state is None and any(tensor is given for given in (*args, *kwargs.values()))
            if handed_on and not tensor.requires_grad:
                # An input that is handed on: what the caller computes with his own has nothing to do with the state.
                with recorder.pausing():
                    state = tensor.clone()
                contents.bind(tensor, mark.prediction)
            if state is not None:
                contents.bind(state, mark.state)
                leaves[i], replaced = state, True
        return rebuild(leaves) if replaced else output

    def note_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not root or threading.get_ident() != thread:
            return
        record = recorder.record
        record.shapes = record.shapes or shapes_in((args, kwargs))
        if record.arguments is None:
            record.arguments = args[0] if len(args) == 1 and not kwargs else (args, kwargs)

    hooks = _Hooks()
    with ExitStack() as stack:
        stack.callback(hooks.remove)
        if not isinstance(root, torch.jit.ScriptModule):  # which takes no hooks, and whose layers nobody sees
            hooks.add(root, root.register_forward_pre_hook(note_batch, with_kwargs=True))
        for module in names:
            hooks.add(module, module.register_forward_hook(after, with_kwargs=True))
        for module in watch.encoders:
            hooks.add(module, module.register_forward_hook(watch.fast_paths.look, with_kwargs=True))
        for module in watch.activations:
            hooks.add(module, module.register_forward_pre_hook(before, with_kwargs=True))
        if watch.compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def in_place(root: nn.Module, states: Mapping[StateKey, Tensor]) -> Iterator[None]:
    """Runs the body with states in place of what the calls of modules below `root` return; nothing is recorded."""
    thread = threading.get_ident()
    counts: dict[nn.Module, int] = {}
    wanted = {key.name for key in states}
    names = {module: clean(name) for name, module in root.named_modules() if clean(name) in wanted}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if module not in names:
            return output
        if threading.get_ident() != thread:
            return output
        number = counts.get(module, 0)
        counts[module] = number + 1
        leaves, rebuild = flattened(output)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and is_continuous(leaf.dtype)]
        for part, i in enumerate(tensors):
            state = states.get(StateKey(names[module], number, part))
            leaves[i] = leaves[i] if state is None else state.detach().to(leaves[i].dtype)
        return rebuild(leaves)

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(after).remove)
        if any("_orig_mod" in module._modules for module in modules_of(root)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


_single: Callable[[list[Any]], Any] = operator.itemgetter(0)


def flattened(output: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of what a module returned, and how to put others in their place. Dataclasses count as containers."""
    if isinstance(output, Tensor):
        return [output], _single
    if dataclasses.is_dataclass(output) and not isinstance(output, type | dict):
        names = [f.name for f in dataclasses.fields(output)]
        leaves, structure = pytree.tree_flatten([getattr(output, name) for name in names])

        def rebuild(others: list[Any]) -> Any:
            again = copy.copy(output)
            for name, value in zip(names, pytree.tree_unflatten(others, structure), strict=True):
                object.__setattr__(again, name, value)
            return again

        return leaves, rebuild
    if isinstance(output, PackedSequence):  # which older releases of torch take for a leaf
        data, *rest = output
        return [data], lambda others: type(output)(*others, *rest)
    leaves, structure = pytree.tree_flatten(output, is_leaf=lambda part: isinstance(part, PackedSequence))
    parts = [flattened(leaf) if isinstance(leaf, PackedSequence) else ([leaf], _single) for leaf in leaves]

    def put_back(others: list[Any]) -> Any:
        rest = iter(others)
        return pytree.tree_unflatten([again([next(rest) for _ in held]) for held, again in parts], structure)

    return [leaf for held, _ in parts for leaf in held], put_back


def is_activation(module: nn.Module) -> bool:
    """Whether a layer at this module is a nonlinearity of its drive, not a block with weights of its own."""
    return isinstance(module, nn.PReLU) or not parameters_of(modules_of(module))


def clean(name: str) -> str:
    """A parameter's or module's name as the user wrote the model, without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class _Hooks:
    """Hooks on modules, which copies and pickles of a module that the user's code makes meanwhile do not take along.

    Copying asks an object for its state, where these hooks less is all that differs. Several of these may be nested.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._before: dict[nn.Module, Any] = {}
        self._ours: set[int] = set()

    def add(self, module: nn.Module, handle: RemovableHandle) -> None:
        """A hook that has just been put on a module."""
        self._handles.append(handle)
        self._ours.add(handle.id)
        if module not in self._before:
            attributes = vars(module)
            self._before[module] = attributes.get("__getstate__")
            state_of = getattr(module, "__getstate__", None) or attributes.copy  # objects have one from 3.11 on
            attributes["__getstate__"] = partial(_state_without, state_of, self._ours)

    def remove(self) -> None:
        """The modules are as they were."""
        for handle in self._handles:
            handle.remove()
        for module, before in self._before.items():
            if before is None:
                vars(module).pop("__getstate__", None)
            else:
                vars(module)["__getstate__"] = before


def _state_without(state_of: Callable[[], Any], hooks: set[int]) -> Any:
    state = state_of()
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != "__getstate__"}
        for name in _HOOKS:
            if not hooks.isdisjoint(state.get(name, ())):
                state[name] = type(state[name])((k, v) for k, v in state[name].items() if k not in hooks)
    return state
