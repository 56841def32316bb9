"""Gradient hooks of the user's: each is told once of a backward pass, as it would be without this library."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_ebm.program.tensors import tensors_in


class Heard:
    """A hook on a tensor, or a module, inside of the network.

    It is told of the gradient that autograd has for the user's own pass. If it gives another in its place it stands
    between layers, and acts on the errors of every other pass as well; one that only looks is not told of these.

    Args:
        hook: the user's.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook
        self._looked = self._changed = self._is_over = False
        self.was_told = False
        """Whether it knows the backward pass that comes now: one that looks is not told twice."""

    def __call__(self, *args: Any) -> Any:
        if self.was_told and self.only_looks:
            return None
        if not tensors_in(args):  # where errors come one at a time there may be one of which nothing arrives
            return None
        result = self._hook(*args)
        self._looked = True
        self._changed |= result is not None and result is not args[0]
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Heard) and self._hook == other._hook

    def __hash__(self) -> int:
        return hash(self._hook)

    @property
    def only_looks(self) -> bool:
        """Whether it was told, and changed nothing; or was not, in a pass that is over, as it had been removed."""
        return (self._looked or self._is_over) and not self._changed

    def over(self) -> None:
        """The pass of the user's own has been differentiated."""
        self._is_over = True


def those_that_change(hooks: Iterable[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """Without those that were told and only looked."""
    return [hook for hook in hooks if not (isinstance(hook, Heard) and hook.only_looks)]


@contextmanager
def without_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Within it `register_hook` on these leaves is silent: what is only compared or looked at is not for them.

    A hook may count, log, or keep what it is given, and one that scales would scale twice.
    """
    taken: list[tuple[Any, Any]] = []
    for leaf in leaves:
        hooks: Any = leaf._backward_hooks
        if hooks:
            taken.append((hooks, hooks.copy()))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.update(before)
