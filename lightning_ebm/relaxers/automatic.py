"""The relaxers that fit an energy and a nudge, for one batch to choose from."""

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import has_best_response, is_quadratic
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Nudge
from lightning_ebm.relaxers import (
    AcceleratedFixedPoint,
    Anderson,
    Cheapest,
    ErrorCoordinates,
    FixedPoint,
    GradientDescent,
    Relaxer,
)


def automatic(energy: Energy, nudge: Nudge, tol: float = 1e-3, max_steps: int = 100) -> Cheapest:
    """What ``relaxer="auto"`` means: the safest candidate first, then what may be faster.

    Quadratic energies are relaxed in error coordinates alone, where a signal is everywhere in one pass and no nudge is
    too small; others in states, by best responses where the energy has them. States that are held at the output, or
    complex, rule out error coordinates.

    Args:
        energy: of the algorithm.
        nudge: of the algorithm.
        tol: relative residual at which a sample has settled, for all candidates.
        max_steps: how many steps each may take.

    Raises:
        ConfigurationError: no relaxer fits both.
    """
    held, analytic = nudge.needs_output_state, nudge.complex_states
    candidates: list[Relaxer] = []
    if is_quadratic(energy) and not held and not analytic:
        candidates = [ErrorCoordinates(max_steps, tol=tol)]
        candidates += [Anderson(max_steps, memory, tol, coordinates="errors") for memory in (1, 4)]
    elif has_best_response(energy):
        candidates = [FixedPoint(max_steps, tol=tol), AcceleratedFixedPoint(max_steps, tol)]
        candidates += [FixedPoint(max_steps, "synchronous", tol)]
        candidates += [] if analytic else [Anderson(max_steps, memory, tol) for memory in (2, 4)]
        candidates += [FixedPoint(max_steps, "synchronous", tol, damping=0.5)]
        candidates += [] if analytic else [GradientDescent(0.5, 2 * max_steps, tol)]
    elif not analytic:
        candidates = [GradientDescent(lr, 2 * max_steps, tol) for lr in (0.5, 0.1, 1.0)]
    if not candidates:
        raise ConfigurationError(
            f'relaxer="auto": nothing fits {energy!r} and {nudge!r}. The states of a holomorphic nudge are complex, and'
            " are followed to a tolerance by best responses alone, which this energy does not have. Write its"
            " best_response, or take ebm.Centered(...)."
        )
    return Cheapest(*candidates)
