"""What the last steps of a descent tell of the inverse Hessian."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Pair(NamedTuple):
    """A step s, the change y of the force along it, 1 / <s, y> and <s, y> / <y, y>; 0 is nothing to learn from."""

    step: list[Tensor]
    change: list[Tensor]
    inverse: Tensor
    scale: Tensor


class InverseHessian:
    """H of limited-memory BFGS: the inverse Hessian nearest to a multiple of 1 that has `H y = s` for the last steps.

    Args:
        memory: how many pairs of steps and changes of force are remembered, each as large as two points.
        dot: the scalar product, ``(B,)`` where each sample has an H of its own, or one number of the batch.
        spread: such numbers shaped to multiply each tensor of a list.

    Source:
        The two loops of Nocedal 1980.
    """

    def __init__(
        self,
        memory: int,
        dot: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        spread: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]],
    ) -> None:
        self._pairs: deque[_Pair] = deque(maxlen=memory)
        self._dot = dot
        self._spread = spread

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def forget(self) -> None:
        """H is 1 again."""
        self._pairs.clear()

    def add(self, step: list[Tensor], change: list[Tensor]) -> None:
        """One more step, and how the force changed along it; along concave ways nothing is learned."""
        curved, size = self._dot(step, change), self._dot(change, change)
        enough = curved > 1e-12 * (self._dot(step, step) * size).sqrt()
        inverse = torch.where(enough, 1 / curved.masked_fill(~enough, 1), 0)
        scale = torch.where(enough & (size > 0), curved / size.masked_fill(size == 0, 1), 0)
        if bool(enough.any()):
            self._pairs.append(_Pair(step, change, inverse, scale))

    def times(self, gradients: Sequence[Tensor], first: float) -> list[Tensor]:
        """H g; `first` times g for those who have taken no step yet."""
        found, shares = list(gradients), []
        for pair in reversed(self._pairs):
            shares.append(pair.inverse * self._dot(pair.step, found))
            found = self._added(found, -shares[-1], pair.change)
        if not self._pairs:
            return [first * x for x in found]
        scale = torch.full_like(self._pairs[0].scale, first)
        for pair in self._pairs:  # the last from which there is something to learn
            scale = torch.where(pair.scale > 0, pair.scale, scale)
        found = [r * x for r, x in zip(self._spread(scale, found), found, strict=True)]
        for pair, share in zip(self._pairs, reversed(shares), strict=True):
            found = self._added(found, share - pair.inverse * self._dot(pair.change, found), pair.step)
        return found

    def _added(self, point: Sequence[Tensor], factors: Tensor, direction: Sequence[Tensor]) -> list[Tensor]:
        spread = self._spread(factors, point)
        return [torch.addcmul(x, f, d) for x, f, d in zip(point, spread, direction, strict=True)]


class InverseHessianOfOne:
    """`InverseHessian` of one vector, whose numbers are Python's: a few operations a step.

    Args:
        memory: see `InverseHessian`.
    """

    def __init__(self, memory: int) -> None:
        self._pairs: deque[tuple[Tensor, Tensor, float, float]] = deque(maxlen=memory)

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def forget(self) -> None:
        """H is 1 again."""
        self._pairs.clear()

    def add(self, step: Tensor, change: Tensor) -> None:
        """One more step, and how the force changed along it; along concave ways nothing is learned."""
        dots = torch.stack([torch.dot(step, change), torch.dot(step, step), torch.dot(change, change)])
        curved, length, size = dots.tolist()
        if curved > 1e-12 * math.sqrt(length * size):
            self._pairs.append((step, change, 1 / curved, curved / size))

    def times(self, gradient: Tensor, first: float) -> Tensor:
        """H g, as a tensor of its own; `first` times g where nothing is known."""
        if not self._pairs:
            return first * gradient
        found, shares = gradient.clone(), list[float]()  # the only one made: as large as all states
        for step, change, inverse, _ in reversed(self._pairs):
            shares.append(inverse * float(torch.dot(step, found)))
            found.sub_(change, alpha=shares[-1])
        found.mul_(self._pairs[-1][3])
        for (step, change, inverse, _), share in zip(self._pairs, reversed(shares), strict=True):
            found.add_(step, alpha=share - inverse * float(torch.dot(change, found)))
        return found
