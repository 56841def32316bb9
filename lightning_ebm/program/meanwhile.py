"""What hooks do between a pass and the gradient of its record: the record keeps what the pass has read.

Lightning calls `on_before_zero_grad` and `on_before_backward` there, in which weights are averaged, clipped or drawn. A
manual step goes on after `on_after_backward`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ebm.program.aliasing import memory_of
from lightning_ebm.program.contents import Contents
from lightning_ebm.program.dispatch import DispatchMode
from lightning_ebm.program.operations import written_by
from lightning_ebm.program.record import Record, Value
from lightning_ebm.program.torch_calls import MAY_WRITE, SET_DATA
from lightning_ebm.program.unseen_writes import UnseenWrites


class Meanwhile(DispatchMode):
    """While it is active, whatever a record has read and is about to be written to is copied before.

    Args:
        record: of a pass.
        contents: what tensors hold, of a pass that goes on after what is not recorded; None if it is over.

    Attributes:
        kept: whether anything has been.
    """

    supports_higher_order_operators = True

    def __init__(self, record: Record, contents: Contents | None = None) -> None:
        super().__init__()
        self.kept = False
        self._record = record
        self._contents = contents
        self._places: dict[int, list[tuple[Value, Tensor]]] | None = None
        self._unseen = UnseenWrites()
        self._calls: Any = _Calls(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = written_by(func, args, kwargs)
        for tensor in written:
            self.about_to_write(tensor)
        result = func(*args, **kwargs)
        if self._contents is not None:
            for tensor in written:
                self._contents.constant_from_now(tensor)
        return result

    def about_to_write(self, tensor: Tensor) -> None:
        """It will hold something else."""
        self._unseen.over()
        for value, held in self._read_from(tensor):
            self._unseen.about_to_write(held, value)
            self._record.inputs[value] = held.detach().clone()

    def about_to_share(self, tensor: Tensor) -> None:
        """Others may write to its memory."""
        self.about_to_write(tensor)
        self._unseen.lent()
        if self._contents is not None:
            self._contents.about_to_share(tensor)

    def about_to_move(self, tensor: Tensor) -> None:
        """It is about to be given other memory."""
        for value, held in self._read_from(tensor):
            self._record.inputs[value] = held.detach()
            self._unseen.moved(value)
        if self._contents is not None:
            self._contents.forget(tensor)

    def _read_from(self, tensor: Tensor) -> list[tuple[Value, Tensor]]:
        """What the record has read from the memory of a tensor, and has no copy of."""
        if self._places is None:
            self._places = {}
            for value, held in {**self._record.leaves, **self._record.inputs}.items():
                self._places.setdefault(memory_of(held), []).append((value, held))
        memory = memory_of(tensor)
        found = self._places.pop(memory, []) if memory else []
        self.kept = self.kept or bool(found)
        return found

    def __enter__(self) -> "Meanwhile":
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)
        if self.kept:
            self._record.overwritten |= self._unseen.found()


class _Calls(TorchFunctionMode):
    """Tells of what no operation below autograd does."""

    def __init__(self, told: Meanwhile) -> None:
        super().__init__()
        self._told = told

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == SET_DATA:
            self._told.about_to_move(args[0])
        elif func in MAY_WRITE:
            self._told.about_to_share(args[0])
        return func(*args, **(kwargs or {}))
