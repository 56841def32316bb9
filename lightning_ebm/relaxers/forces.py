"""What an evaluation of the network gives: energies and their slope."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor


class Forces:
    """The energies of a point and their slope.

    Args:
        internal: I_b, energy of each sample, ``(B,)``; or what `finish` makes that of.
        loss: L summed over the batch, a scalar (a user's loss comes as one number, not per sample).
        gradients: dE/dx_l with E = sum_b I_b + lambda L, one tensor a layer. In error coordinates the gradient in the
            metric of the precision, e_l + 1/Pi_l * lambda dL/de_l, whose unit step is the fixed-point map.
        finish: the last sums on the way to I_b, which most points are never asked for; None if it is there.
    """

    __slots__ = ("finish", "gradients", "loss", "parts")

    def __init__(
        self,
        internal: Tensor | Sequence[Tensor],
        loss: Tensor,
        gradients: list[Tensor],
        finish: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        self.parts = (internal,) if isinstance(internal, Tensor) else tuple(internal)
        self.loss = loss
        self.gradients = gradients
        self.finish = finish

    @property
    def internal(self) -> Tensor:
        """I_b, ``(B,)``."""
        if self.finish is not None:
            self.parts, self.finish = (self.finish(self.parts),), None
        return self.parts[0]

    def with_gradients(self, gradients: list[Tensor]) -> "Forces":
        """The same energies with another slope."""
        return Forces(self.parts, self.loss, gradients, self.finish)


def total_energy(forces: Forces, strength: complex) -> Tensor:
    """I + lambda L of the batch, its real part where the nudge is complex."""
    total = (forces.internal.sum() + strength * forces.loss).detach()
    return total.real if total.is_complex() else total


class Energies(Sequence[Tensor]):
    """I + lambda L of the batch along a relaxation, summed up when it is looked at.

    What there is to sum is kept in one tensor made beforehand: many small ones, each made between two large ones, would
    leave memory in pieces of which none is large enough for the next.

    Args:
        length: how many points there will be.
        strength: lambda.
    """

    def __init__(self, length: int, strength: complex) -> None:
        self._length = length
        self._strength = strength
        self._blocks: list[_Block] = []
        self._rows: list[tuple[_Block, Tensor]] = []

    def add(self, forces: Forces) -> None:
        """Notes the energies of the next point."""
        tensors = [*forces.parts, forces.loss]
        block = self._blocks[-1] if self._blocks else None
        if block is None or block.finish is not forces.finish:  # other code, other sums
            shapes = [tensor.shape for tensor in tensors]
            dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
            size = self._length - len(self._rows), sum(shape.numel() for shape in shapes)
            real = [not tensor.is_complex() for tensor in tensors]
            block = _Block(shapes, real, forces.finish, iter(tensors[0].new_empty(size, dtype=dtype).unbind()))
            self._blocks.append(block)
        row = next(block.rows)
        torch.cat([tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors], out=row)
        self._rows.append((block, row))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        block, row = self._rows[index]
        tensors = torch.split(row, [shape.numel() for shape in block.shapes])
        parts = zip(tensors, block.shapes, block.real, strict=True)
        *internal, loss = [t.view(shape).real if real else t.view(shape) for t, shape, real in parts]
        return total_energy(Forces(internal, loss, [], block.finish), self._strength)


class _Block(NamedTuple):
    """Points whose energies are finished by the same sums."""

    shapes: list[torch.Size]
    real: list[bool]
    finish: Callable[[Sequence[Tensor]], Tensor] | None
    rows: Iterator[Tensor]
