"""The descent that fits a batch."""

from collections.abc import Sequence

from torch import Tensor

from lightning_ebm.evaluations import Landscape
from lightning_ebm.evaluations.base import Coordinates
from lightning_ebm.relaxers.barzilai_borwein import BarzilaiBorwein
from lightning_ebm.relaxers.base import Relaxation
from lightning_ebm.relaxers.descent import Task
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
    least: Tensor | None = None,
) -> Relaxation:
    """argmin of the energy from `start`: each sample by itself, or the batch as one where samples see each other.

    Args:
        landscape: as in `Task`, as are those not listed.
        coordinates: see there.
        start: see there.
        strength: see there.
        lr: see there.
        max_steps: how many evaluations after the first.
        tol: see there.
        longest: the largest step size of a sample by itself.
        least: see there.
    """
    task = Task(landscape, coordinates, start, strength, lr, tol, least)
    del start  # descent on errors lets go of it
    if landscape.samples_interact:
        return JointDescent(task).run(max_steps)
    return BarzilaiBorwein(task, longest).run(max_steps)
