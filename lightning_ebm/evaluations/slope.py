"""The energies of a point and their slope: what most evaluations give."""

from collections.abc import Callable, Sequence

from torch import Tensor


class Slope:
    """The energies of a point and their slope.

    Args:
        internal: I_b, energy of each sample, ``(B,)``; or what `finish` makes that of.
        loss: L summed over the batch, a scalar (a user's loss comes as one number, not per sample).
        gradients: dE/dx_l with E = sum_b I_b + lambda L, one tensor a layer. In error coordinates the gradient in the
            metric of the precision, e_l + 1/Pi_l * lambda dL/de_l, whose unit step is the fixed-point map.
        finish: the last sums on the way to I_b, which most points are never asked for; None if it is there.
    """

    __slots__ = ("finish", "gradients", "loss", "parts")

    def __init__(
        self,
        internal: Tensor | Sequence[Tensor],
        loss: Tensor,
        gradients: list[Tensor],
        finish: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        self.parts = (internal,) if isinstance(internal, Tensor) else tuple(internal)
        self.loss = loss
        self.gradients = gradients
        self.finish = finish

    @property
    def internal(self) -> Tensor:
        """I_b, ``(B,)``."""
        if self.finish is not None:
            self.parts, self.finish = (self.finish(self.parts),), None
        return self.parts[0]

    def with_gradients(self, gradients: list[Tensor]) -> "Slope":
        """The same energies with another slope."""
        return Slope(self.parts, self.loss, gradients, self.finish)

    def total(self, strength: complex) -> Tensor:
        """I + lambda L of the batch, its real part where the nudge is complex."""
        total = (self.internal.sum() + strength * self.loss).detach()
        return total.real if total.is_complex() else total
