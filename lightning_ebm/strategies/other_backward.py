"""`backward` calls of the user's own beside the one that the Trainer makes: allowed where harmless, else refused."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.wiring import graph_of


def within_step(accumulated: int, loss: Tensor, options: dict[str, Any]) -> bool:
    """`loss.backward()` in an automatic training step: what it leaves in `.grad` is wiped, as in stock."""
    if accumulated > 1 and options.get("inputs") is None:
        raise ConfigurationError(
            "training_step calls backward() itself, and gradients are accumulated over batches: what it leaves in"
            " .grad is a gradient of backprop that would be added to the updates. Use torch.autograd.grad for"
            " gradients inside the step, or accumulate_grad_batches=1."
        )
    return False


def beside(module: LightningModule, surrogate: Tensor, loss: Tensor, options: dict[str, Any]) -> bool:
    """`backward()` of another loss, in a LightningModule.backward of the user's own."""
    if loss is surrogate or options.get("inputs") is not None:
        return False
    if graph_of([loss], {surrogate.grad_fn})[0]:
        raise ConfigurationError(
            f"{type(module).__name__}.backward differentiates another loss beside the one it was given: that"
            " one would learn by plain backpropagation, in silence. Add it to the loss that training_step returns,"
            " or take manual optimization and call manual_backward for each."
        )
    return False
