"""The training step run once more, for energies whose free equilibrium is not the forward pass."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def loss_of(output: STEP_OUTPUT) -> Any:
    """The loss in what a training step returned."""
    return output.get("loss") if isinstance(output, Mapping) else output


def run_again(module: LightningModule, precision: Precision, arguments: Arguments) -> STEP_OUTPUT:
    """The training step, quietly, in containers of its own: a step may pop entries off its batch."""
    args, kwargs = apply_to_collection(arguments, Tensor, lambda t: t)
    # Past any wrapper: passes are local, and devices need different numbers of them.
    with precision.train_step_context():
        return module.training_step(*args, **kwargs)
