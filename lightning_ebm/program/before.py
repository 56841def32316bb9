"""What tensors held, and which memory they lay in, before a pass wrote to them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.program.dispatch import DispatchMode
from lightning_ebm.program.operations import written_by


class Before:
    """What is to be put back.

    Args:
        of: True notes whatever is written to, False nothing; or the tensors that are noted.
    """

    def __init__(self, of: bool | Iterable[Tensor]) -> None:
        self._notes = of is not False
        self._only = None if isinstance(of, bool) else {id(tensor) for tensor in of}
        self._contents: list[tuple[Tensor, Tensor]] = []
        self._memory: list[tuple[Tensor, Tensor]] = []
        """Tensors that were given other memory, and what they lay in."""

    def _is_noted(self, tensor: Tensor) -> bool:
        return self._notes and (self._only is None or id(tensor) in self._only)

    def written(self, tensor: Tensor) -> None:
        """The tensor is about to be written to."""
        if self._is_noted(tensor):
            with torch.no_grad():  # to a recorder around this it is a constant, and shares no memory with the tensor
                once = _once(tensor)
                self._contents.append((once, once.clone()))

    def content_of(self, tensor: Tensor) -> Tensor:
        """What it held before the pass, if it is noted."""
        return next((content for noted, content in self._contents if noted is tensor), tensor)

    def moved(self, tensor: Tensor) -> None:
        """The tensor is about to be given other memory."""
        if self._is_noted(tensor):
            self._memory.append((tensor, tensor.data))

    def restore(self, about_to_write: Callable[[Tensor], None]) -> None:
        """Puts everything back, once.

        Args:
            about_to_write: told of each tensor before it is written to.
        """
        self._notes = False
        for tensor, memory in reversed(self._memory):
            tensor.data = memory
        with torch.no_grad():
            for tensor, content in reversed(self._contents):
                if tensor.shape == content.shape:  # else it was made in the pass, and has been given its size there
                    about_to_write(tensor)
                    tensor.copy_(content)
        self._contents.clear()
        self._memory.clear()


def _once(tensor: Tensor) -> Tensor:
    """Every element of its memory once, of one that is expanded: to more of them torch does not copy."""
    for dim, stride in enumerate(tensor.stride() if tensor.layout is torch.strided else ()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class Undoing(DispatchMode):
    """Within it what is written to tensors is noted, wherever they are held; `restore` puts it back."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._before = Before(True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in written_by(func, args, kwargs):
            self._before.written(tensor)
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Every tensor holds again what it held before."""
        self._before.restore(lambda tensor: None)
