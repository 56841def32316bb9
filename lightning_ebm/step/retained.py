"""Gradients of activations that the user wants to see (`Tensor.retain_grad`), where nobody differentiates the graph."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_ebm.program.user_hooks import Heard


class Retained:
    """The loss's own gradients with respect to tensors that its pass computed, for their `.grad`.

    They are autograd's, of the user's uncut pass, under every algorithm: an update is local, and has no others.

    Args:
        loss: in its own graph, which is kept.
        tensors: those that `retain_grad` was called on.
    """

    def __init__(self, loss: Tensor, tensors: Sequence[Tensor]) -> None:
        self._tensors = [t for t in tensors if t.grad_fn is not None] if loss.requires_grad else []
        self._before = [tensor.grad for tensor in self._tensors]
        self._found: Sequence[Tensor | None] = ()
        if self._tensors:
            self._found = torch.autograd.grad(loss, self._tensors, retain_graph=True, allow_unused=True)

    @contextmanager
    def told(self, hooks: Iterable[Heard]) -> Iterator[None]:
        """Within it hooks know the backward pass that this has made, if it has made one."""
        for hook in hooks if self._tensors else ():
            hook.was_told = True
        try:
            yield
        finally:
            for hook in hooks:
                hook.was_told = False

    def restore(self) -> None:
        """Takes back what gradients on their way through these tensors have left there since."""
        for tensor, before in zip(self._tensors, self._before, strict=True):
            tensor.grad = before

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within it gradients are taken that are not to be there afterwards."""
        before = [tensor.grad for tensor in self._tensors]
        try:
            yield
        finally:
            for tensor, gradient in zip(self._tensors, before, strict=True):
                tensor.grad = gradient

    def give(self, factor: Tensor) -> None:
        """Adds them, times a factor, to what is there."""
        for tensor, found in zip(self._tensors, self._found, strict=True):
            if found is not None:
                gradient = found * factor.to(found.dtype)
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
