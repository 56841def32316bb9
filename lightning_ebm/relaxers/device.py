"""A network whose states and forces are held and measured by a device: what relaxers of such devices see."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations import Around, Evaluation, Landscape
from lightning_ebm.evaluations.base import Result
from lightning_ebm.relaxers.base import Relaxer

Change = Callable[[Tensor], Tensor]


class Device(Around):
    """The landscape with a device in front of it.

    Args:
        landscape: the exact one.
        states: what becomes of a state each time it is written, after a step or as the response of a layer; None
            leaves it.
        forces: what becomes of a force, or of the force on an error, each time it is measured; None leaves it.
    """

    conservative = False

    def __init__(self, landscape: Landscape, states: Change | None, forces: Change | None) -> None:
        super().__init__(landscape)
        self._states, self._forces = states, forces

    @property
    def unwatched(self) -> Landscape:
        return Device(self.inner.unwatched, self._states, self._forces)

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        found = self.inner.evaluate(what, point, strength)
        if (forces := self._forces) is not None:
            found = what.with_slope(found, lambda slope: slope.with_gradients([forces(g) for g in slope.gradients]))
        if (states := self._states) is not None:
            found = what.with_states(found, lambda k, state: states(state))
        return found

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`. Relaxers ask for it after every step of the states."""
        found = self.inner.feasible(states)
        return found if self._states is None else [self._states(state) for state in found]


def refuse_errors(owner: object, relaxer: Relaxer) -> None:
    """Refuses relaxers that hold no states."""
    if relaxer.needs_error_coordinates:
        raise ConfigurationError(
            f"{type(owner).__name__}({relaxer!r}, states=...): this relaxer moves errors, and a device that holds those"
            " holds no states. Give forces=..., or take ebm.GradientDescent(lr, max_steps), ebm.FixedPoint(max_steps)."
        )
