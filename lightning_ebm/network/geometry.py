"""Sums over the units of each sample, whatever the shapes of the layers."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_ebm.network.samples import by_sample, layout_of, norm_by_sample, to_samples


class Geometry:
    """The sums of a `Landscape`.

    Args:
        states: of each layer, in its shape.
        batch_size: B.

    Attributes:
        layouts: of each layer, the dimension of its samples, see `layout_of`.
    """

    def __init__(self, states: Sequence[Tensor], batch_size: int) -> None:
        self.batch_size = batch_size
        self.layouts = [layout_of(state.shape, batch_size) for state in states]

    def per_sample(self, tensors: Iterable[Tensor]) -> Tensor:
        """See `Landscape.per_sample`."""
        rows = list(map(by_sample, tensors, self.layouts, itertools.repeat(self.batch_size)))  # one tensor at a time
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)

    def norms(self, tensors: Iterable[Tensor], layers: Sequence[int] | None = None) -> Tensor:
        """See `Landscape.norms`. Reads each tensor once where its samples lie in rows, and makes none of its size.

        Args:
            tensors: one for each of the layers.
            layers: which; None is all.
        """
        layouts = self.layouts if layers is None else [self.layouts[k] for k in layers]
        rows = [norm_by_sample(t, layout, self.batch_size) for t, layout in zip(tensors, layouts, strict=True)]
        if len(rows) == 1:
            return rows[0]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(rows), dim=0)
        return whole

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """See `Landscape.products`."""
        rows = [
            by_sample((a.conj() * b).real if a.is_complex() else a * b, self.layouts[k], self.batch_size)
            for k, a, b in zip(layers, left, right, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)

    def spread(self, values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """See `Landscape.spread`."""
        return [to_samples(values, t, layout) for t, layout in zip(like, self.layouts, strict=True)]
