"""How much energy a descent has still to gain, judged by its last steps."""

from typing import Literal

import torch
from torch import Tensor

_SHORTER = 0.7
"""Than any step before; on quadratics no descent was seen to come below, one after the other, while it was not over."""


class GainLeft:
    """The energy still to be gained, and whether a kink is what keeps forces from vanishing.

    P_k is what the next step promises on a quadratic, half its length times the slope. The steps to come gain at most
    about sum_j P_k r^j = P_k / (1 - r), where r is the rate at which promises have fallen over the window.

    A smooth energy has a least step size, one over its largest curvature, and is soon back at longer ones. At a kink
    the force jumps however short the step: the curvature that is met is one over the step, and promises fall because
    steps shrink, one after the other and below all before the window, while forces stay.

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
        left = self._to_come()[1] * (squares / self._squares[-1])
        return left.where((self._promised[-1] > 0) & (squares > 0), 0.0)

    def _to_come(self) -> tuple[Tensor, Tensor]:
        """The rate r at which promises fell a step, and P_k / (1 - r), which is infinite where they did not."""
        first, last, steps = self._promised[0], self._promised[-1], len(self._promised) - 1
        rate = (last / first) ** (1 / steps) if steps else torch.zeros_like(last)
        return rate, torch.where(rate < 1, last / (1 - rate), torch.inf)

    def verdict(self, gained: Tensor, at_kinks: float, elsewhere: float) -> Literal["kink", "stalled"] | None:
        """Says "kink" or "stalled" where no more is left than a fraction of what was gained; None where more is.

        Args:
            gained: since the start.
            at_kinks: the fraction, if a kink is what keeps forces from vanishing.
            elsewhere: the fraction, if nothing is.
        """
        found = self.judged(gained, at_kinks, elsewhere)
        kink, over = (False, False) if found is None else found.tolist()
        return "kink" if kink else "stalled" if over else None

    def judged(self, gained: Tensor, at_kinks: float, elsewhere: float) -> Tensor | None:
        """Whether it is at a kink, and whether it has stalled, as `verdict`; None where it is too early to tell."""
        if len(self._promised) <= self._window or self._least is None:
            return None
        promised, squares = torch.stack(self._promised), torch.stack(self._squares)
        rate, left = self._to_come()
        sizes = promised / squares
        shrunk = (sizes[-1] / sizes[0] < squares[-1] / squares[0]) & (sizes[-1] < _SHORTER * self._least)
        steadily = shrunk & (sizes[1:] < sizes[:-1]).all()
        # One short step, as a line search may end in, says nothing by itself.
        least = (rate < 1) & (promised.amax() <= (1 - rate) * elsewhere * gained)
        little = steadily & (left <= at_kinks * gained)
        return torch.stack([little | least & shrunk, least])
