"""What a host asks a device, as seldom as can be: every number that is read waits for all that was computed before."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Then = Callable[[list[float]], None]
"""What is done with numbers once they are read; may raise."""


def runs_behind(device: torch.device) -> bool:
    """Whether a device computes while the host goes on, so that reading a number costs more than a step in vain."""
    return device.type not in ("cpu", "meta")


class Questions:
    """The questions of one training step: those that can wait are read with the next that cannot.

    Args:
        rarely: whether to ask rarely, see `runs_behind`. What is found is the same either way: a relaxation that is
            over stays where it is until somebody asks.

    Attributes:
        gathers: whether what can wait does; else it is read at once.
    """

    def __init__(self, rarely: bool = False) -> None:
        self.rarely = rarely
        self.gathers = False
        self._waiting: list[tuple[Tensor, Then]] = []

    def is_due(self, steps: int) -> bool:
        """Whether a relaxation by tolerance is to be asked how it goes, after so many steps.

        Where questions cost nothing, always; else after 4, 8, 16, 24, ... steps, so that it is asked at most
        2 + steps/8 times, of the steps that it needs.
        """
        return not self.rarely or steps == 4 or (steps > 0 and steps % 8 == 0)

    def ask(self, numbers: Tensor) -> list[float]:
        """The numbers, one-dimensional; and whatever waits is read with them, and done before."""
        waiting, self._waiting = self._waiting, []
        *earlier, own = _read([*(found for found, _ in waiting), numbers])
        for (_, then), found in zip(waiting, earlier, strict=True):
            then(found)
        return own

    def later(self, numbers: Tensor, then: Then) -> None:
        """Hands the numbers to `then` when they are read: at once, or with the next question."""
        self._waiting.append((numbers, then))
        if not self.gathers:
            self.answered()

    def answered(self) -> None:
        """Reads what waits."""
        if self._waiting:
            self.ask(self._waiting[0][0][:0])


class Arrival:
    """Whether all samples of a relaxation by tolerance have settled, asked as seldom as `Questions` says.

    Args:
        questions: of the training step.
        device: of the states.

    Attributes:
        over: on the device, above 0 if all had settled at the last look.
        arrived: whether they are known to have.
        steps: that were needed, once that has been read.
    """

    def __init__(self, questions: Questions, device: torch.device) -> None:
        self._questions = questions
        self.over = self._taken = torch.zeros((), device=device)
        self.arrived = False
        self.steps = 0

    def look(self, settled: Tensor, steps: int, last: bool) -> bool:
        """Notes which samples have settled, ``(B,)``, after so many steps; whether it is known to be over."""
        self._taken = torch.where(self.over > 0, self._taken, steps)
        self.over = settled.all().to(self._taken)
        if last or self._questions.is_due(steps):
            arrived, needed = self._questions.ask(torch.stack([self.over, self._taken]))
            self.arrived, self.steps = arrived > 0, int(needed)
        return self.arrived


def _read(lists: Sequence[Tensor]) -> list[list[float]]:
    """The numbers of each, by one copy."""
    if len(lists) == 1:
        return [lists[0].tolist()]
    dtype = max((found.dtype for found in lists), key=_digits)
    numbers = torch.cat([found.to(lists[0].device, dtype) for found in lists]).tolist()
    ends = torch.Size(len(found) for found in lists)
    return [numbers[sum(ends[:k]) : sum(ends[: k + 1])] for k in range(len(ends))]


def _digits(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps if dtype.is_floating_point else -2.0
