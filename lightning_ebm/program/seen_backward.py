"""Seeing the user's own `backward()` calls while a step runs, so that none of them trains by backprop in silence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.recorder import Recorder

TakesCare = Callable[[Tensor, dict[str, Any]], bool]
"""Told of a call, by the tensor and its options; answers whether it has done what the call was to do."""

_NAMES = ("gradient", "retain_graph", "create_graph", "inputs")


class _Backward(TorchFunctionMode):
    def __init__(self, recorder: Recorder | None, takes_care: TakesCare) -> None:
        super().__init__()
        self._recorder = recorder
        self._takes_care = takes_care

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        listens = func is Tensor.backward and (self._recorder is None or not self._recorder.paused)
        if listens and self._takes_care(args[0], {**dict(zip(_NAMES, args[1:], strict=False)), **kwargs}):
            return None
        return func(*args, **kwargs)


@contextmanager
def seen_backward(recorder: Recorder | None, takes_care: TakesCare) -> Iterator[None]:
    """Within it, `takes_care` is told of every `Tensor.backward`, unless the recorder pauses."""
    with _Backward(recorder, takes_care):
        yield


@contextmanager
def no_other_backward() -> Iterator[None]:
    """Within it, `Tensor.backward` on all leaves is refused: it would add backprop's gradients to the updates."""

    def refuse(loss: Tensor, options: dict[str, Any]) -> bool:
        if options.get("inputs") is not None:
            return False
        raise ConfigurationError(
            "The closure calls backward() itself: that adds a gradient of plain backpropagation to the update. Use"
            " torch.autograd.grad for gradients inside the closure, and call learner.backward once for each loss."
        )

    with seen_backward(None, refuse):
        yield
