"""Hooks that are put on a user's modules for one pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class OwnHooks:
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
