"""Where the samples of a batch lie in a tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ebm import checked

BatchSize = int | Callable[[Any], int] | None
"""Number of samples: a number, a function of the batch, or found."""
Scale = float | Callable[[], float] | None
"""A factor that a loss carries already: a number, or a function without arguments; None is 1."""


@dataclass(frozen=True)
class Samples:
    """What users say of their batches.

    Args:
        batch_size: see `BatchSize`.
        loss_scale: see `Scale`.

    Raises:
        ConfigurationError: a number that is not positive.
    """

    batch_size: BatchSize = None
    loss_scale: Scale = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and not callable(self.batch_size):
            checked.keep(self, batch_size=_size(self.batch_size))
        if self.loss_scale is not None and not callable(self.loss_scale):
            checked.keep(self, loss_scale=_positive(self.loss_scale))

    def of(self, batch: Any) -> int | None:
        """The number of samples in a batch; None is to be found."""
        return _size(self.batch_size(batch)) if callable(self.batch_size) else self.batch_size

    def scale(self) -> float:
        """The factor of now."""
        if self.loss_scale is None:
            return 1.0
        return _positive(self.loss_scale()) if callable(self.loss_scale) else self.loss_scale


def _size(value: Any) -> int:
    why = ", or a function of the batch that gives one; the nudge is multiplied by the number of samples"
    return checked.count("", "batch_size", value, why=why)


def _positive(value: Any) -> float:
    wanted = "a positive number, or a function that gives one; the nudge is divided by the factor that the loss carries"
    return checked.number("", "scale", value, wanted, above=0)


FOUND = Samples()


def layout_of(shape: torch.Size, batch_size: int) -> int | None:
    """Where the samples are: in dimension 0 (or a multiple of B folded into it), in dimension 1, or (None) nowhere."""
    if len(shape) and shape[0] == batch_size:
        return 0
    if len(shape) > 1 and shape[1] == batch_size:
        return 1
    return 0 if len(shape) and shape[0] and shape[0] % batch_size == 0 else None


def by_sample(tensor: Tensor, layout: int | None, batch_size: int) -> Tensor:
    """The sum over all but the samples, ``(B,)``."""
    if layout is None:  # belongs to all samples: each is charged its share
        return (tensor.sum() / batch_size).expand(batch_size)
    if layout == 0 and tensor.ndim == 2 and len(tensor) == batch_size:
        return tensor.sum(1)
    return tensor.movedim(layout, 0).reshape(batch_size, -1).sum(1)


def squares_by_sample(tensor: Tensor, layout: int | None, batch_size: int) -> Tensor:
    """`by_sample` of |t|^2, ``(B,)``; reads the tensor once where its samples lie in rows."""
    if layout == 0:
        return norm_by_sample(tensor, layout, batch_size).square()
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return by_sample(parts.square(), layout, batch_size)


def norm_by_sample(tensor: Tensor, layout: int | None, batch_size: int) -> Tensor:
    """|t| of each sample, ``(B,)``: the root of `squares_by_sample`."""
    if layout != 0:
        return squares_by_sample(tensor, layout, batch_size).sqrt()
    if tensor.is_complex():  # of complex numbers, torch's norm takes many times as long as of their parts
        tensor = torch.view_as_real(tensor)
    rows = tensor if len(tensor) == batch_size and tensor.ndim > 1 else tensor.reshape(batch_size, -1)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.ndim)))
    return norm


def to_samples(values: Tensor, like: Tensor, layout: int | None) -> Tensor:
    """One number a sample, ``(B,)``, shaped to multiply a tensor."""
    if layout is None:  # moves as the most cautious sample does
        return values.amin().reshape([1] * like.ndim)
    folded = like.shape[layout] // values.shape[0]
    values = values.repeat_interleave(folded) if folded > 1 else values
    return values.reshape([-1 if d == layout else 1 for d in range(like.ndim)])


def samples_first(tensor: Tensor, layout: int | None, batch_size: int) -> Tensor:
    """The same numbers as ``(B, ...)``; as they are where they belong to all samples."""
    if layout is None:
        return tensor
    rows = tensor.movedim(layout, 0)
    return rows if len(rows) == batch_size else rows.reshape(batch_size, -1, *rows.shape[1:])


def samples_back(tensor: Tensor, like: Tensor, layout: int | None) -> Tensor:
    """What `samples_first` gave, as the layer has it."""
    if layout is None:
        return tensor
    rows = like.movedim(layout, 0)
    return tensor.reshape(rows.shape).movedim(0, layout)
