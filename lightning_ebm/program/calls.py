"""Watching calls of modules while a pass is recorded: what they return is marked, and nothing is replaced.

One of the two files that touch a user's modules. It does so with forward hooks, inside a context manager that removes
them whatever happens; the user's own hooks run as ever, before.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ebm.program.aliasing import is_wrapped
from lightning_ebm.program.batch_size import declared_size, shapes_in
from lightning_ebm.program.module_walk import clean, modules_of
from lightning_ebm.program.own_hooks import OwnHooks
from lightning_ebm.program.record import Mark, StateKey, Value, is_continuous
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.program.tensors import opened
from lightning_ebm.program.watch import Watch

Replace = Callable[[Mark, Tensor], Tensor | None]
"""Gives the state that is to stand for what a call returned; None leaves it alone."""


def nothing_in_place(mark: Mark, output: Tensor) -> None:
    """Leaves what every call returned."""


class _Counted:
    """Which of several calls of one module in a pass each is, in the thread that the pass runs in.

    Args:
        names: of the modules that are watched.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.names = names
        self._counts: dict[nn.Module, int] = {}
        self._thread = threading.get_ident()

    @property
    def is_here(self) -> bool:
        """Whether this is the thread of the pass: others may call the same modules meanwhile."""
        return threading.get_ident() == self._thread

    def number(self, module: nn.Module) -> int | None:
        """The number of a call that has returned; None of another thread, or of a copy, which took the hook along."""
        if module not in self.names or not self.is_here:
            return None
        number = self._counts.get(module, 0)
        self._counts[module] = number + 1
        return number


class Calls:
    """Marks in a record what the calls of modules below `root` return, while this is active as a context manager.

    Args:
        root: the user's module, for the batch size.
        recorder: what records.
        watch: which modules.
        replace: for energies whose free equilibrium is not the forward pass, the states to hand out.
    """

    def __init__(self, root: nn.Module, recorder: Recorder, watch: Watch, replace: Replace) -> None:
        watch.renew()
        self._root = root
        self._recorder = recorder
        # What the record knows of a tensor is not asked of the tensor: under a mode of torch that takes microseconds.
        self._contents = recorder.contents
        self._watch = watch
        self._replace = replace
        self._counted = _Counted(watch.names)
        self._drives: dict[nn.Module, Value] = {}
        self._hooks = OwnHooks()
        self._open = ExitStack()

    def __enter__(self) -> None:
        hooks, watch, root = self._hooks, self._watch, self._root
        with ExitStack() as opening:
            opening.callback(hooks.remove)
            if not isinstance(root, torch.jit.ScriptModule):  # which takes no hooks, and whose layers nobody sees
                hooks.add(root, root.register_forward_pre_hook(self._note_batch, with_kwargs=True))
            for module in watch.names:
                hooks.add(module, module.register_forward_hook(self._returned, with_kwargs=True))
            for module in watch.encoders:
                hooks.add(module, module.register_forward_hook(watch.fast_paths.look, with_kwargs=True))
            for module in watch.activations:
                hooks.add(module, module.register_forward_pre_hook(self._note_drive, with_kwargs=True))
            if watch.compiled:
                opening.enter_context(torch.compiler.set_stance("force_eager"))
            self._open = opening.pop_all()

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls":
        """Itself: a copy that is made of a watched module in a way of its own takes the hooks along, and no record."""
        return self

    def _marks_now(self) -> bool:
        return torch.is_grad_enabled() and not self._recorder.pausing.depth

    def _is_wrapped(self, tensor: Tensor) -> bool:
        with self._recorder.pausing():  # it is not the user who hands out its memory
            return is_wrapped(tensor)

    def _carries(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor):
            return False
        known = self._contents.known(leaf)
        return is_continuous(leaf.dtype if known is None else known.meta[2])

    def _keeps_shape(self, drive: Value | None, output: Any) -> bool:
        """Whether a call returned another tensor of the shape of the one that it was called with."""
        known = self._contents.known(output) if isinstance(output, Tensor) else None
        return drive is not None and known is not None and known is not drive and known.shape == drive.shape

    # Hooks

    def _note_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._root or not self._counted.is_here:
            return
        record = self._recorder.record
        record.shapes = record.shapes or shapes_in((args, kwargs))
        if record.arguments is None:
            record.arguments = args[0] if len(args) == 1 and not kwargs else (args, kwargs)

    def _note_drive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self._watch.names or not self._counted.is_here or not self._marks_now():
            return
        drive = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if drive is not None and (self._contents.known(drive) is not None or not self._is_wrapped(drive)):
            self._drives[module] = self._contents.value(drive)

    def _returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        number = self._counted.number(module)
        if number is None:
            return output
        drive = self._drives.pop(module, None)
        if not self._marks_now() or (module in self._watch.suspects and not self._keeps_shape(drive, output)):
            return output
        if args and (size := declared_size(args[0], self._watch.batch_first.get(module))) is not None:
            self._recorder.record.declared.add(size)
        name, given = self._watch.names[module], (*args, *kwargs.values())
        if isinstance(output, Tensor):  # most do
            carries = self._carries(output)
            state = self._marked(StateKey(name, number, 0), module, drive, output, given) if carries else None
            return output if state is None else state
        leaves, rebuilt = opened(output)
        replaced = False
        for part, places in enumerate(_places(leaves, self._carries)):
            state = self._marked(StateKey(name, number, part), module, drive, leaves[places[0]], given)
            if state is not None:
                replaced = True
                for place in places:
                    leaves[place] = state
        return rebuilt(leaves) if replaced else output

    def _marked(
        self, key: StateKey, module: nn.Module, drive: Value | None, tensor: Tensor, given: Sequence[Any]
    ) -> Tensor | None:
        """Marks one of the tensors that a call returned; what is to stand in its place, if anything is."""
        contents = self._contents
        known = contents.known(tensor)
        if known is None and self._is_wrapped(tensor):
            self._recorder.record.transformed = True
            return None
        if known is None and not tensor.requires_grad and module not in self._watch.chosen:
            return None
        mark = self._recorder.mark(key, module, drive, tensor, self._watch.weighted[module])
        state = self._replace(mark, tensor)
        if state is None and any(tensor is other for other in given) and not tensor.requires_grad:
            # An input that is handed on: what the caller computes with his own has nothing to do with the state.
            with self._recorder.pausing():
                state = tensor.clone()
            contents.bind(tensor, mark.prediction)
        if state is not None:
            contents.bind(state, mark.state)
        return state


@contextmanager
def in_place(root: nn.Module, states: Mapping[StateKey, Tensor]) -> Iterator[None]:
    """Runs the body with states in place of what the calls of modules below `root` return; nothing is recorded."""
    wanted = {key.name for key in states}
    names = {module: clean(name) for name, module in root.named_modules() if clean(name) in wanted}
    counted = _Counted(names)

    def returned(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        number = counted.number(module)
        if number is None:
            return output
        leaves, rebuilt = opened(output)
        for part, places in enumerate(_places(leaves, _is_continuous)):
            if (state := states.get(StateKey(names[module], number, part))) is not None:
                for place in places:
                    leaves[place] = state.detach().to(leaves[place].dtype)
        return rebuilt(leaves)

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(returned).remove)
        if any("_orig_mod" in module._modules for module in modules_of(root)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _places(leaves: Sequence[Any], carries: Callable[[Any], bool]) -> Iterable[list[int]]:
    """Where each of the tensors that can carry a state stands among the leaves: some are returned more than once."""
    found: dict[int, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if carries(leaf):
            found.setdefault(id(leaf), []).append(place)
    return found.values()


def _is_continuous(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and is_continuous(leaf.dtype)
