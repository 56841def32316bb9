"""Which evaluation of a network captured code stands for."""

from typing import Literal, NamedTuple

Kind = Literal["forces", "error_forces", "responses", "answers", "energy", "update", "dyads", "dyadic update", "hops"]


class Mode(NamedTuple):
    """Which evaluation.

    Attributes:
        kind: the method of the landscape that it stands for; "energy" is I and L, "update" dE/dtheta alone, "dyadic
            update" that of pairs, whose point is their means, then their leading and their trailing states.
        nudged: whether the loss pulls.
        layers: of answers, whose.
        phases: of an update, how many phases it sums over; of answers, how many phases they are given for at once.
        lr: of forces, the step that is taken along them: the next point is given in their place, and no update.
        moved: of forces, the states that may be elsewhere than the forward pass left them, see `Front`; None is all.
        wanted: of those, the layers whose forces, or next states, are given; None is all.
        continued: whether states and nudge are complex.
        norms: of forces, whether their norm is given, by sample; without a step, in their place.
    """

    kind: Kind
    nudged: bool
    layers: tuple[int, ...] = ()
    phases: int = 1
    lr: float | None = None
    moved: frozenset[int] | None = None
    wanted: tuple[int, ...] | None = None
    continued: bool = False
    norms: bool = False

    @property
    def updates(self) -> bool:
        """Whether it gives dE/dtheta too."""
        kinds = ("forces", "error_forces", "update", "dyadic update", "hops")
        return self.kind in kinds and self.lr is None and self.moved is None

    @property
    def has_energy(self) -> bool:
        """Whether it gives the energy of each sample."""
        return self.kind in ("forces", "error_forces", "responses", "hops") and not self.summed

    @property
    def repeated(self) -> bool:
        """Whether a batch is evaluated at many points, or this is what such points lead to."""
        return self.summed or self.kind in ("error_forces", "responses", "answers", "dyads", "update", "dyadic update")

    @property
    def summed(self) -> bool:
        """Whether the energy is one number, I + lambda L of the batch: nobody asks for more without the forces."""
        return self.lr is not None or self.norms

    @property
    def in_errors(self) -> bool:
        """Whether the point is one of errors."""
        return self.kind in ("error_forces", "hops")
