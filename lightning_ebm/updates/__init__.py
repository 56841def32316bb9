"""Updates: what is read off the phases. One update a file."""

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.updates.backprop import Backprop
from lightning_ebm.updates.base import End, Term, Update
from lightning_ebm.updates.continual import Continual
from lightning_ebm.updates.contrast import Contrast
from lightning_ebm.updates.cross_derivative import CrossDerivative
from lightning_ebm.updates.displacement import Displacement
from lightning_ebm.updates.dyadic_contrast import DyadicContrast
from lightning_ebm.updates.first_arrival import FirstArrival
from lightning_ebm.updates.fixed_prediction import FixedPrediction
from lightning_ebm.updates.incremental import Incremental
from lightning_ebm.updates.left_at_layers import LeftAtLayers
from lightning_ebm.updates.multipliers import Multipliers

__all__ = [
    "Backprop",
    "Continual",
    "Contrast",
    "CrossDerivative",
    "Displacement",
    "DyadicContrast",
    "End",
    "FirstArrival",
    "FixedPrediction",
    "Incremental",
    "LeftAtLayers",
    "Multipliers",
    "Term",
    "Update",
    "named",
    "updates",
]

_SHIPPED: tuple[type[Update], ...] = (
    Contrast, CrossDerivative, FirstArrival, FixedPrediction, Multipliers, DyadicContrast, Displacement, Incremental,
    Continual, Backprop,
)  # fmt: skip


def updates() -> tuple[str, ...]:
    """The names of those that the library ships."""
    return tuple(kind.name for kind in _SHIPPED)


def named(which: str | Update) -> Update:
    """An update by its name, or the one that is given.

    Raises:
        ConfigurationError: there is none of that name, or it is something else.
    """
    if isinstance(which, Update):
        return which
    for kind in _SHIPPED:
        if isinstance(which, str) and kind.name == which:
            return kind()
    raise ConfigurationError(
        f'Algorithm(update={which!r}): expected "auto", an instance of ebm.Update, or one of {", ".join(updates())}.'
    )
