"""What evaluations have in common whose result is a `Slope`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ebm.evaluations.base import Evaluation
from lightning_ebm.evaluations.slope import Slope


class SlopeEvaluation(Evaluation[Slope]):
    """An evaluation that gives energies and a slope."""

    def flat(self, found: Slope) -> list[Tensor]:
        return [found.internal, found.loss, *found.gradients]

    def built(self, tensors: list[Tensor], layers: int) -> Slope:
        internal, loss, *gradients = tensors
        return Slope(internal, loss, gradients)

    def slope(self, found: Slope) -> Slope:
        return found

    def with_slope(self, found: Slope, change: Callable[[Slope], Slope]) -> Slope:
        return change(found)


def ones_for(tensor: Tensor) -> Tensor:
    """Ones of its kind, made without its value, which code then need not compute."""
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def holomorphic(slope: Tensor) -> Tensor:
    """autograd gives the conjugate of a holomorphic function's derivative."""
    return slope.conj_physical() if slope.is_complex() else slope


def is_one(factor: complex | Tensor) -> bool:
    return not isinstance(factor, Tensor) and factor == 1
