"""What relaxations cost: the passes through the network that they ask for, counted from outside."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_ebm.evaluations import Around, Evaluation, Landscape
from lightning_ebm.evaluations.base import Result
from lightning_ebm.questions import Questions

_REDUCTION = 0.1
"""Passes that a sum over all states costs, with the arithmetic around it: measured 0.08 to 0.25 on MLPs."""


class TooDear(Exception):  # not an error: the end of a trial that has lost already
    pass


class Counting(Around):
    """A `Landscape` that hands every question on, and counts what the answers cost.

    Args:
        landscape: the one that knows.
        limit: from where on it refuses.
    """

    def __init__(self, landscape: Landscape, limit: float) -> None:
        super().__init__(landscape)
        self._limit = limit
        self.cost = 0.0
        self._questions = Questions()  # steps in vain are no part of what a relaxer costs

    @property
    def questions(self) -> Questions:
        return self._questions

    def evaluate(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        self._spend(what.cost(len(self.names)))
        return self.inner.evaluate(what, point, strength)

    def per_sample(self, tensors: Iterable[Tensor]) -> Tensor:
        self._spend(_REDUCTION)
        return self.inner.per_sample(tensors)

    def norms(self, tensors: Iterable[Tensor]) -> Tensor:
        self._spend(_REDUCTION)
        return self.inner.norms(tensors)

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        self._spend(_REDUCTION * len(layers) / len(self.names))
        return self.inner.products(left, right, layers)

    def _spend(self, cost: float) -> None:
        self.cost += cost
        if self.cost > self._limit:
            raise TooDear
