"""The network and the batch that the checks are made on."""

from typing import Literal

import torch
from torch import Tensor, nn


class Problem:
    """A tanh network 4-6-5-3 in float64, six samples, and half the squared distance to targets as the loss.

    Attributes:
        module: the network.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        modules: list[nn.Module] = []
        for inside, outside in ((4, 6), (6, 5), (5, 3)):
            linear = nn.Linear(inside, outside, dtype=torch.float64)
            linear.weight.data, linear.bias.data = (
                0.8 * self.drawn(outside, inside) / inside**0.5,
                0.1 * self.drawn(outside),
            )
            modules += [linear, nn.Tanh()]
        self.module = nn.Sequential(*modules[:-1])
        self._x, self._y = self.drawn(6, 4), self.drawn(6, 3)

    def drawn(self, *shape: int) -> Tensor:
        """Normal numbers, the same ones in every run."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._x)

    def loss(self, reduction: Literal["mean", "sum"] = "mean", rows: slice = slice(None)) -> Tensor:
        """The loss of some of the samples."""
        losses: Tensor = 0.5 * (self.module(self._x[rows]) - self._y[rows]).square().sum(1)
        return losses.mean() if reduction == "mean" else losses.sum()
