"""How much energy a descent has still to gain, judged by its last steps."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

_AT_KINKS = 1e-3
"""Of the energy gained, what may be left where steps shrink."""
_SURE = 0.5
"""The rate below which what follows the next step is less than that step itself."""
_SHORTER = 0.7
"""Than any step before; on quadratics no descent was seen to come below, one after the other, while it was not over."""


class GainLeft:
    """The energy still to be gained, and whether a kink is what keeps forces from vanishing.

    P_k is what the next step promises on a quadratic, half its length times the slope. The steps to come gain at most
    about sum_j P_k r^j = P_k / (1 - r), where r is the rate at which promises have fallen over the window.

    A smooth energy has a least step size, one over its largest curvature, and is soon back at longer ones. At a kink
    the force jumps however short the step: the curvature that is met is one over the step, and promises fall because
    steps shrink, one after the other and below all before the window, while forces stay. Where kinks are crossed in
    full stride, energy falls and forces stay behind. In errors the energy curves by 1 at least where the loss is
    convex, so that at eta^2 of the energy gained above the least the update is off by about eta.

    Args:
        window: over how many steps rates are taken.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._promised: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._least: Tensor | None = None
        """The smallest step size before the window."""

    def note(self, promised: Tensor, squares: Tensor) -> None:
        """One more step has been chosen.

        Args:
            promised: P_k of the batch.
            squares: |g_k|^2 of the batch, of the samples that are to move.
        """
        self._promised = [*self._promised, promised][-self._window - 1 :]
        self._squares = [*self._squares, squares][-self._window - 1 :]
        oldest = self._promised[0] / self._squares[0]
        self._least = oldest if self._least is None else torch.fmin(self._least, oldest)

    def left(self, squares: Tensor) -> Tensor | None:
        """The energy still to be gained, at most about; None before a step was chosen.

        Args:
            squares: |g|^2 of now, of the samples that are to move.
        """
        if not self._promised:
            return None
        _, to_come = _to_come(self._promised, torch.where)
        left: Tensor = _left(to_come, self._promised, self._squares, squares, torch.where)
        return left

    def verdict(self, gained: Tensor, now: Tensor, first: Tensor, tol: float) -> Literal["kink", "stalled"] | None:
        """Says "kink" or "stalled" where no more is left than a fraction of what was gained; None where more is.

        "kink": less than tol^2 seems left, the energy at a force of tol, while that on the batch is above it, and
        promises have halved with every step of the window, so that the next one is most of what is left; or, where
        steps shrink as at a kink, less than a thousandth. "stalled": less than (tol/10)^2 is left, and neither is so.

        Args:
            gained: since the start.
            now: |g|^2 of now, of the samples that are to move.
            first: |g|^2 of the start, of the batch.
            tol: relative force at which a sample has settled.
        """
        count = len(self._promised)
        if count < 2 or self._least is None:
            return None
        numbers = torch.stack([*self._promised, *self._squares, self._least, gained, now, first]).tolist()
        promised, squares = numbers[:count], numbers[count : 2 * count]
        if not min(*promised, *squares) > 0:
            return None
        kink, over = _judged(promised, squares, numbers[2 * count :], tol, self._window, _where)
        return "kink" if kink else "stalled" if over else None

    def judged(self, gained: Tensor, now: Tensor, first: Tensor, tol: float) -> Tensor | None:
        """Whether it is "kink", and whether it is "stalled", decided on the device; None where it is too early to tell.

        See `verdict`.
        """
        if len(self._promised) < 2 or self._least is None:
            return None
        numbers = self._least, gained, now, first
        kink, over = _judged(self._promised, self._squares, numbers, tol, self._window, torch.where)
        return torch.stack([kink, over])


# By operators that numbers and tensors have in common, so that the host and the device judge by the same lines.


def _where(condition: bool, one: float, other: float) -> float:
    return one if condition else other


def _to_come(promised: Sequence[Any], where: Any) -> tuple[Any, Any]:
    """The rate r at which promises fell a step, and P_k / (1 - r), which is infinite where they did not."""
    last, steps = promised[-1], len(promised) - 1
    rate = (last / promised[0]) ** (1 / steps) if steps else 0.0 * last
    falls = rate < 1
    return rate, where(falls, last / where(falls, 1 - rate, 1.0), math.inf)


def _left(to_come: Any, promised: Sequence[Any], squares: Sequence[Any], now: Any, where: Any) -> Any:
    return where((promised[-1] > 0) & (now > 0), to_come * (now / squares[-1]), 0.0)


def _judged(
    promised: Sequence[Any], squares: Sequence[Any], numbers: Sequence[Any], tol: float, window: int, where: Any
) -> tuple[Any, Any]:
    smallest, gained, now, first = numbers
    rate, to_come = _to_come(promised, where)
    left = _left(to_come, promised, squares, now, where)
    level = (left <= tol**2 * gained) & (now > tol**2 * first)
    for before, after in itertools.pairwise(promised):
        level = level & (after <= _SURE * before)
    if len(promised) <= window:
        return level, level & False
    sizes = [p / s for p, s in zip(promised, squares, strict=True)]
    shrunk = (sizes[-1] / sizes[0] < squares[-1] / squares[0]) & (sizes[-1] < _SHORTER * smallest)
    steadily, least, most = shrunk, rate < 1, (1 - rate) * ((tol / 10) ** 2 * gained)
    for before, after in itertools.pairwise(sizes):
        steadily = steadily & (after < before)
    for each in promised:  # one short step, as a line search may end in, says nothing by itself
        least = least & (each <= most)
    little = steadily & (to_come <= min(tol, _AT_KINKS) * gained)
    return level | little | least & shrunk, least
