"""Seeing `backward()` calls where nothing is recorded, so that none of them trains by backprop in silence."""

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.recorder import TakesCare


class SeenBackward(TorchFunctionMode):
    """Within it, `takes_care` is told of every `Tensor.backward`."""

    def __init__(self, takes_care: TakesCare) -> None:
        super().__init__()
        self._takes_care = takes_care

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward and self._takes_care(args[0], dict(kwargs or {})):
            return None
        return func(*args, **(kwargs or {}))


def refuse_backward(loss: Tensor, options: dict[str, Any]) -> bool:
    """`Tensor.backward` on all leaves, in a closure, would add backprop's gradients to the updates."""
    if options.get("inputs") is not None:
        return False
    raise ConfigurationError(
        "The closure calls backward() itself: that adds a gradient of plain backpropagation to the update. Use"
        " torch.autograd.grad for gradients inside the closure, and call learner.backward once for each loss."
    )
