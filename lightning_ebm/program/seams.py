"""Places of autograd that no mode of torch sees: custom functions, hooks on saved tensors, backward hooks of modules,
and `torch.autograd.backward`.

They are watched only while something records or a strategy trains, and only for the thread that does.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import BackwardHook

from lightning_ebm.program.custom_calls import record_function, record_hooked
from lightning_ebm.program.named import named
from lightning_ebm.program.tensors import all_of
from lightning_ebm.program.user_hooks import Heard, those_that_change

if TYPE_CHECKING:
    from lightning_ebm.program.recorder import Recorder

_FUNCTION: Any = torch.autograd.Function.__base__
"""What `apply` of every custom function comes to, also of one that was taken before: `f = MyFunction.apply`."""
_FUNCTION_APPLY = next(vars(cls)["apply"] for cls in _FUNCTION.__mro__ if "apply" in vars(cls))
_ENTER_HOOKS = saved_tensors_hooks.__dict__["__enter__"]
_SETUP_INPUT: Callable[..., Any] = BackwardHook.setup_input_hook
_SETUP_OUTPUT: Callable[..., Any] = BackwardHook.setup_output_hook
_BACKWARD = torch.autograd.backward


Sees = Callable[[list[Tensor], Any], None]
"""Told of a `backward` call: the tensors that it begins at, and the inputs that it is limited to, None being all."""


class _Seams(threading.local):
    """The recorders of one thread, the innermost last, and who is told of `backward` where none records."""

    _lock = threading.Lock()
    _users = 0

    def __init__(self) -> None:
        self._active: list[Recorder] = []
        self.watching: list[Sees] = []

    def enter(self, recorder: "Recorder") -> None:
        """The recorder is told of custom functions and of hooks on saved tensors from now on."""
        self._active.append(recorder)
        self._use()

    def leave(self, recorder: "Recorder") -> None:
        """It is told no more; torch is as it was when no recorder is left."""
        self._active.remove(recorder)
        self._disuse()

    def watch(self, sees: Sees) -> None:
        """From now on it is told of every `backward` of this thread that is not recorded."""
        self.watching.append(sees)
        self._use()

    def unwatch(self, sees: Sees) -> None:
        """It is told no more, if it was."""
        if sees in self.watching:
            self.watching.remove(sees)
            self._disuse()

    def _use(self) -> None:
        with _Seams._lock:
            _Seams._users += 1
            if _Seams._users == 1:
                for owner, name, _, watched in _PLACES:
                    setattr(owner, name, watched)

    def _disuse(self) -> None:
        with _Seams._lock:
            _Seams._users -= 1
            if _Seams._users == 0:
                for owner, name, plain, _ in _PLACES:
                    delattr(owner, name) if plain is None else setattr(owner, name, plain)

    @property
    def recorder(self) -> "Recorder | None":
        """The one that records here and now."""
        if not self._active or self._active[-1].pausing.depth:
            return None
        return self._active[-1]


seams = _Seams()


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    plain = _FUNCTION_APPLY.__get__(None, cls)
    recorder = seams.recorder
    if recorder is None or not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    return record_function(recorder, cls, plain, args, kwargs)


def _enter_hooks(self: saved_tensors_hooks) -> None:
    recorder = seams.recorder
    if recorder is not None:
        name = named(self.pack_hook)
        recorder.record.notes.append(".".join(name))
        recorder.record.packs = recorder.record.packs or name.module.partition(".")[0] != "torch"
    _ENTER_HOOKS(self)


class HookedCall:
    """One call of a module with backward hooks, made anew in every run; equal to another with the same hooks."""

    def __init__(self, of: BackwardHook) -> None:
        self._parts = of.module, of.user_hooks, of.user_pre_hooks
        self.hook = of
        self._begun = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookedCall) and all(
            one is another or one == another for one, another in zip(self._parts, other._parts, strict=True)
        )

    @property
    def module(self) -> Any:
        """That is called."""
        return self._parts[0]

    @property
    def changes(self) -> bool:
        """Whether any of its hooks gives another gradient."""
        return any(those_that_change(hooks) for hooks in self._parts[1:])

    def renew(self) -> None:
        """The next run is another backward pass."""
        module, *hooks = self._parts
        n_inputs, self.hook = self.hook.n_inputs, BackwardHook(module, *map(those_that_change, hooks))
        self.hook.n_inputs, self._begun = n_inputs, True

    def ended(self) -> BackwardHook:
        """The hook for what the call returned, whose input may have had no gradient and be in no record."""
        if not self._begun:
            self.renew()
        self._begun = False
        return self.hook


def hooked_input(call: HookedCall, *tensors: Tensor) -> Any:
    """What a module with backward hooks is called with."""
    call.renew()
    return _SETUP_INPUT(call.hook, tensors)


def hooked_output(call: HookedCall, *tensors: Tensor) -> Any:
    """What a module with backward hooks returned."""
    return _SETUP_OUTPUT(call.ended(), tensors)


_calls: dict[int, HookedCall] = {}
"""Of modules that are being called right now."""


def _setup_input(self: BackwardHook, args: Any) -> Any:
    if (recorder := seams.recorder) is None or not torch.is_grad_enabled():
        return _SETUP_INPUT(self, args)
    self.user_hooks, self.user_pre_hooks = [*map(Heard, self.user_hooks)], [*map(Heard, self.user_pre_hooks)]
    recorder.record.heard += [*self.user_hooks, *self.user_pre_hooks]
    call = _calls[id(self)] = HookedCall(self)
    return record_hooked(recorder, hooked_input, call, partial(_SETUP_INPUT, self), args)


def _setup_output(self: BackwardHook, args: Any) -> Any:
    if (recorder := seams.recorder) is None or (call := _calls.pop(id(self), None)) is None:
        return _SETUP_OUTPUT(self, args)
    return record_hooked(recorder, hooked_output, call, partial(_SETUP_OUTPUT, self), args)


def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    recorder, watching = seams.recorder, seams.watching
    if recorder is None and not watching:
        return _BACKWARD(tensors, *args, **kwargs)
    options = {**dict(zip(_OPTIONS, args, strict=False)), **kwargs}
    several = all_of(tensors)
    if recorder is None:
        for sees in watching:
            sees(several, options.get("inputs"))
        return _BACKWARD(tensors, *args, **kwargs)
    gradients = options.pop("grad_tensors", None)
    given = [None] * len(several) if gradients is None else all_of(gradients)
    left = [pair for pair in zip(several, given, strict=True) if not recorder.takes_care(*pair, options)]
    if left:
        losses, weights = zip(*left, strict=True)
        _BACKWARD(losses, None if gradients is None else weights, **options)
    return None


_OPTIONS = ("grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")
_PLACES: tuple[tuple[Any, str, Any, Any], ...] = (
    (_FUNCTION, "apply", vars(_FUNCTION).get("apply"), classmethod(_apply)),
    (saved_tensors_hooks, "__enter__", _ENTER_HOOKS, _enter_hooks),
    (BackwardHook, "setup_input_hook", _SETUP_INPUT, _setup_input),
    (BackwardHook, "setup_output_hook", _SETUP_OUTPUT, _setup_output),
    (torch.autograd, "backward", _BACKWARD, _backward),
)
"""Where something is put while anything records: owner, name, what is there (None: its base's), what is put there."""
