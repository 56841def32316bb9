"""What an evaluation of the network gives: energies and their slope."""

import functools
from collections.abc import Callable, Sequence
from typing import overload

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
        self._count = 0
        self._kept = torch.empty(0)
        self._shapes: list[torch.Size] = []
        self._finish: Callable[[Sequence[Tensor]], Tensor] | None = None

    def add(self, forces: Forces) -> None:
        """Notes the energies of the next point."""
        tensors = [*forces.parts, forces.loss]
        if not self._count:
            self._shapes = [tensor.shape for tensor in tensors]
            self._finish = forces.finish
            size = sum(tensor.numel() for tensor in tensors)
            dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
            self._kept = tensors[0].new_empty((self._length, size), dtype=dtype)
        assert [tensor.shape for tensor in tensors] == self._shapes
        flat = [tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors]
        torch.cat(flat, out=self._kept[self._count])
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        row = self._kept[index % self._count]
        *parts, loss = torch.split(row, [shape.numel() for shape in self._shapes])
        parts = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=False)]
        return total_energy(Forces(parts, loss.view(self._shapes[-1]), [], self._finish), self._strength)
