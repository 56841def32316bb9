"""Writes to memory that autograd has kept, where it does not look: it then differentiates by what is there by now.

So do writes to `x.data`, and other tensors in its place; those of NumPy and of others that are handed the memory; and
those of a batch norm in training mode to running statistics that one in evaluation mode has read before. What autograd
gives then is the slope of no function, and no record gives it at other states.
"""

import torch
from torch import Tensor

from lightning_ebm.program.record import Value


class UnseenWrites:
    """Which values of a record lie in memory that has been written to so, since they were read or handed out."""

    def __init__(self) -> None:
        self._announced: list[tuple[Tensor, int, Value]] = []
        """What the latest write may change, and how many writes autograd had counted."""
        self._lent: list[tuple[Tensor, Tensor, Value]] = []
        """What others may write to at any time, and what it held when they were handed it."""
        self._found: set[Value] = set()

    def about_to_write(self, tensor: Tensor, value: Value) -> None:
        """What holds a value is about to be written to, or shares memory with what is."""
        try:
            self._announced.append((tensor, tensor._version, value))
        except RuntimeError:  # made in inference mode: autograd has kept it nowhere, and counts nothing
            return

    def over(self) -> None:
        """What was announced has been done; autograd counts those writes that it sees."""
        self._found.update(value for tensor, count, value in self._announced if tensor._version == count)
        self._announced.clear()

    def moved(self, value: Value) -> None:
        """What holds it is given other memory, which autograd takes for that which it has kept, if it is a leaf."""
        self._found.add(value)

    def lent(self) -> None:
        """What was announced may be done at any time, by others."""
        self._lent += [(tensor, tensor.detach().clone(), value) for tensor, _, value in self._announced]
        self._announced.clear()

    def shared(self, tensor: Tensor, content: Tensor, value: Value) -> None:
        """A tensor that has been read lies in memory of others, which they may write to at any time."""
        self._lent.append((tensor, content, value))

    def found(self) -> set[Value]:
        """The values, up to now."""
        self.over()
        self._found.update(value for tensor, content, value in self._lent if not _same(tensor.detach(), content))
        return self._found


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, which nan is here."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
