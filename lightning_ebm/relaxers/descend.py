"""The descent that fits a batch."""

from collections.abc import Sequence

from torch import Tensor

from lightning_ebm.evaluations import Landscape
from lightning_ebm.evaluations.base import Coordinates
from lightning_ebm.relaxers.barzilai_borwein import BarzilaiBorwein
from lightning_ebm.relaxers.base import Relaxation
from lightning_ebm.relaxers.descent import Descent
from lightning_ebm.relaxers.joint_descent import JointDescent


def descend(
    landscape: Landscape,
    coordinates: Coordinates,
    start: Sequence[Tensor],
    strength: float,
    lr: float,
    max_steps: int,
    tol: float,
    longest: float,
) -> Relaxation:
    """argmin of the energy from `start`: each sample by itself, or the batch as one where samples see each other.

    Args:
        landscape: as in `Descent`, as are those not listed.
        coordinates: see there.
        start: see there.
        strength: see there.
        lr: see there.
        max_steps: how many evaluations after the first.
        tol: see there.
        longest: the largest step size of a sample by itself.
    """
    descent: Descent
    if landscape.samples_interact:
        descent = JointDescent(landscape, coordinates, start, strength, lr, tol)
    else:
        descent = BarzilaiBorwein(landscape, coordinates, start, strength, lr, tol, longest)
    del start  # descent on errors lets go of it
    while (status := descent.status(max_steps)) is None:
        descent.step()
    return descent.ended(status)
