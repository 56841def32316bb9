"""Gradients of the user's own beside those that the Trainer asks for: allowed where harmless, else refused."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.autograd_graph import graph_of


class OtherBackward:
    """Sees `backward` calls that are not recorded: of the update that is handed over, or of something else."""

    def __init__(self) -> None:
        self._handed: Tensor | None = None
        self._strange: list[Tensor] = []

    @contextmanager
    def handing_over(self, surrogate: Tensor) -> Iterator[None]:
        """Within it the gradient of this scalar, which is the update, is asked for."""
        if all(p.grad is None or not p.grad.any() for p in self._strange):  # they have been wiped
            self._strange.clear()
        self._handed = surrogate
        try:
            yield
        finally:
            self._handed = None

    def sees(
        self,
        module: LightningModule,
        optimizers: Iterable[Optimizer],
        losses: Sequence[Tensor],
        inputs: Sequence[Tensor] | None,
    ) -> None:
        """Gradients of some losses are asked for: refused beside the update, else not to be stepped on."""
        if self._handed is not None:
            beside(module, self._handed, losses, inputs)
        else:
            self._strange += reached(losses, inputs, parameters_of_optimizers(optimizers))

    def refuse(self) -> None:
        """Raises `ConfigurationError` where what an optimizer moves holds a gradient of somebody else's."""
        if any(p.grad is not None for p in self._strange):
            raise elsewhere()

    def forget(self) -> None:
        """A run is over."""
        self._strange.clear()


def within_step(trained: Iterable[Tensor], accumulated: int, loss: Tensor, options: dict[str, Any]) -> bool:
    """`loss.backward()` in an automatic training step: what it leaves in `.grad` is wiped, as in stock."""
    if accumulated > 1 and options.get("inputs") is None and reached([loss], None, trained):
        raise ConfigurationError(
            "training_step calls backward() itself, and gradients are accumulated over batches: what it leaves in"
            " .grad is a gradient of backprop that would be added to the updates. Use torch.autograd.grad for"
            " gradients inside the step, or accumulate_grad_batches=1."
        )
    return False


def beside(
    module: LightningModule, surrogate: Tensor, losses: Sequence[Tensor], inputs: Sequence[Tensor] | None
) -> None:
    """A gradient, by `backward` or `torch.autograd.grad`, in a LightningModule.backward of the user's own.

    Raises:
        ConfigurationError: it is of another loss than the one that this was given, with respect to parameters.
    """
    if reached(losses, inputs, module.parameters(), but=surrogate):
        raise ConfigurationError(
            f"{type(module).__name__}.backward differentiates another loss beside the one it was given: that"
            " one would learn by plain backpropagation, in silence. Add it to the loss that training_step returns,"
            " or take manual optimization and call manual_backward for each."
        )


def elsewhere() -> ConfigurationError:
    """For a step on gradients that come of a `backward` outside of training_step and LightningModule.backward."""
    return ConfigurationError(
        "backward() was called on another loss before an optimizer took its step, outside of training_step (in"
        " optimizer_step, a hook or a callback): that is plain backpropagation, and the step would take it for the"
        " update. For the update at other weights, call the closure that optimizer_step is given once more, or take"
        " manual optimization and call self.manual_backward for each loss; a penalty belongs into the loss that"
        " training_step returns."
    )


def parameters_of_optimizers(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """All that some optimizer moves."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def reached(
    losses: Sequence[Tensor],
    inputs: Sequence[Tensor] | None,
    parameters: Iterable[Tensor],
    but: Tensor | None = None,
) -> list[Tensor]:
    """The parameters that a backward pass gives gradients to.

    Args:
        losses: what it begins at.
        inputs: to which it is limited; None is all leaves.
        parameters: which count.
        but: a tensor through which it may reach them.
    """
    stops = set() if but is None or but.grad_fn is None else {but.grad_fn}
    leaves = graph_of([loss for loss in losses if loss is not but], stops)[0]
    if inputs is not None:
        limit = {id(tensor) for tensor in inputs}
        leaves = [leaf for leaf in leaves if id(leaf) in limit]
    counted = {id(p) for p in parameters} if leaves else set()
    return [leaf for leaf in leaves if id(leaf) in counted]
