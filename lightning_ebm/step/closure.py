"""What a closure must return."""

import cmath
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.program.autograd_graph import reached_parameters

Closure = Callable[[], Tensor]
"""Runs the user's forward pass and returns the loss, a scalar."""


def check_closure(closure: Any) -> None:
    """Refuses what cannot be run.

    Raises:
        ConfigurationError: it is no function, such as a loss that has been computed already.
    """
    if not callable(closure):
        raise ConfigurationError(
            f"closure is {type(closure).__name__}; expected a function that runs the pass and returns its loss, such as"
            " `lambda: loss_function(module(x), y)`: the pass is recorded while it runs, so that a loss which has been"
            " computed already comes too late."
        )


def check_finite(loss: Tensor) -> None:
    """Refuses a loss that is nan or infinite."""
    if not cmath.isfinite(loss.item()):
        raise RelaxationDivergedError(
            f"The loss of the forward pass is {float(loss.detach())}: there is nothing finite to relax towards."
            " Look for it with Trainer(detect_anomaly=True), lower the learning rate of the"
            " parameters, or clip."
        )


class NoLossError(ConfigurationError):
    """The closure returned something other than a tensor."""


def is_number(returned: Any) -> bool:
    """Whether what a closure returned can be a loss: one number, rather than an output or nothing."""
    return isinstance(returned, Tensor) and returned.numel() == 1


def checked_loss(loss: Any, module: nn.Module) -> Tensor:
    """`loss`, if it is a real scalar that depends on something; `module` is to learn from it."""
    if not isinstance(loss, Tensor):
        remedy = "Did it forget to `return loss`?" if loss is None else "Return the loss alone."
        raise NoLossError(
            f"The closure returned {'None' if loss is None else type(loss).__name__}; expected the loss, a scalar"
            f" tensor: without it there is nothing to nudge the states. {remedy}"
        )
    if loss.numel() != 1:
        raise ConfigurationError(
            f"The loss has shape {tuple(loss.shape)}; expected a scalar. Reduce it over the batch, and say how with"
            ' loss_reduction="mean" or "sum".'
        )
    if loss.is_complex():
        raise ConfigurationError(
            "The loss is a complex number; expected a real one, which alone can be lowered. Return its square modulus,"
            " `loss.abs().square()`, or its real part, `loss.real`."
        )
    if not loss.requires_grad and not any(p.requires_grad for p in module.parameters()):
        raise ConfigurationError(
            f"No parameter of {type(module).__name__} is to be trained: all are frozen, or there are none, so that"
            " nothing could be learned from the loss. Thaw what is meant to learn: module.requires_grad_(True)."
        )
    if not loss.requires_grad:
        raise ConfigurationError(
            "The loss does not depend on any parameter or state through autograd: it was computed under no_grad,"
            " from detached tensors, from .item(), or from outputs that are not the module's. Nothing could be learned"
            " from it; return the loss tensor itself."
        )
    return loss


def refuse_backward(module: nn.Module, loss: Tensor, options: dict[str, Any]) -> bool:
    """`Tensor.backward` on all leaves, in a closure, would add backprop's gradients to the updates of the module.

    Not what is computed by others: a copy that an inner loop adapts, a critic beside it.
    """
    if options.get("inputs") is not None or not reached_parameters(module, loss):
        return False
    raise ConfigurationError(
        "The closure calls backward() itself: that adds a gradient of plain backpropagation to the update. Use"
        " torch.autograd.grad for gradients inside the closure, and call learner.backward once for each loss."
    )
