"""How far two gradients that are the same on paper may part."""

import math
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from lightning_ebm.program.exact_rule import exact_rule
from lightning_ebm.program.interpreter import Program, at_prediction
from lightning_ebm.program.tensors import largest
from lightning_ebm.program.wiring import Plan


class Rounding:
    """How far two gradients of one parameter may part by rounding.

    What cancels, as the slope of a bias in front of a batch norm does, is as large as the rounding of its parts: how
    large that is shows where the rule is run again on multiples of the loss, as all of it is then rounded elsewhere.

    Args:
        program: the record, cut at its states.
        plan: the wiring.
        leaves: the parameters.
        ours: their gradients by the exact rule.
        rounding: the largest eps of the formats that the pass is computed in.
    """

    MULTIPLES = (0.7, 1.37, 45.0)
    """No powers of two, which round as the loss itself does; one in which nothing vanishes that float16 cannot hold."""

    def __init__(
        self, program: Program, plan: Plan, leaves: Sequence[Tensor], ours: Sequence[Tensor | None], rounding: float
    ) -> None:
        self._program, self._plan, self._leaves, self._ours = program, plan, leaves, ours
        self._relative = min(1e4 * rounding, 0.1)
        self._top = max((largest(g) for g in ours if g is not None), default=0.0)
        self._faint = min(max(1e-3, 128 * rounding), 1.0)

    def explains(self, k: int, off: float, size: float) -> bool:
        """Whether a parameter's gradient of that size may part that far."""
        if off <= self._relative * max(size, 1e-3 * self._top):
            return True
        if off > self._relative * size + 16 * self._noise[k]:
            return False
        # An operation with a state of its own moves gradients as well, and moves them where nothing is scaled.
        return off <= self._relative * max(size, self._faint * self._top) or not self._moved(1.0)[k]

    @cached_property
    def _noise(self) -> list[float]:
        """Of each parameter, how far its gradient moves where the loss is scaled."""
        return [max(of) for of in zip(*map(self._moved, self.MULTIPLES), strict=True)]

    def _moved(self, multiple: float) -> list[float]:
        """How far gradients move, at most, where the rule is run again on that multiple; 0 where one overflows."""
        again = exact_rule(self._program.run(at_prediction()), self._plan, self._leaves, multiple)
        pairs = zip(self._ours, again, strict=True)
        moved = [0.0 if g is None or m is None else largest(m.to_dense() / multiple - g) for g, m in pairs]
        return [size if math.isfinite(size) else 0.0 for size in moved]
