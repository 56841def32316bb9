"""Gradient hooks that users put on parameters: they act once, on the update."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


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
