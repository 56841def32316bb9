"""Tensors whose contents autograd does not know of: written to while gradients are off, they keep their slope."""

from typing import Any

import torch
from torch import Tensor


class AtValue(torch.autograd.Function):
    """A tensor with other contents, whose gradient is that tensor's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, content: Tensor) -> Tensor:
        return content.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def at_value(tensor: Tensor, content: Tensor) -> Tensor:
    """See `AtValue`."""
    apply: Any = AtValue.apply
    found: Tensor = apply(tensor, content)
    return found


def written_unseen(tensor: Tensor, functional: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a tensor is after a write that autograd did not see: `y.clamp_(min=eps)` under `torch.no_grad()`.

    Args:
        tensor: y, as it was.
        functional: the operation that returns what was written, such as `aten.clamp`.
        args: its other arguments.
        kwargs: likewise.
    """
    with torch.no_grad():
        content = functional(tensor, *args, **kwargs)
    return at_value(tensor, content)


def content_of(tensor: Tensor, content: Tensor) -> Tensor:
    """For `written_unseen`: what a tensor was given, which no operation tells."""
    return content
