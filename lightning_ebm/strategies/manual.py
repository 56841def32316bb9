"""Manual optimization: every gradient that an optimizer steps on must have come from a relaxation."""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.autograd_graph import graph_of
from lightning_ebm.program.locality import Products
from lightning_ebm.program.recorder import Recorder, TakesCare
from lightning_ebm.program.tensors import all_of

log = logging.getLogger(__name__)


def weighted(losses: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """For `losses.backward(gradient)`: one loss, of several sum_i gradient_i loss_i, and the gradient that is left."""
    if gradient is None or losses.numel() == 1:
        return losses, gradient
    return (losses * gradient.detach()).sum(), None


def _names(module: LightningModule) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


def _teaches(parameter: Tensor) -> bool:
    gradient = parameter.grad
    return gradient is not None and (gradient.is_sparse or bool(gradient.any()))


def _is_again(parameter: Tensor, last: tuple[weakref.ref[Tensor], int] | None) -> bool:
    """Whether its gradient is one that was there before, and has not been written to since."""
    gradient = parameter.grad
    return last is not None and gradient is not None and last[0]() is gradient and last[1] == gradient._version


class ManualOptimization:
    """The record of a training step that calls `backward` itself, and whose gradients it has.

    Attributes:
        recorder: of the training step that is running; None outside of one.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self._relaxed: dict[str | int, set[int]] = {}
        """Parameters whose gradients a relaxation has given, and the optimizers that have stepped on them since.

        By name, as those of FSDP are other tensors in a backward pass; by identity where the module does not hold them.
        """
        self._stepped_on: dict[int, dict[int, tuple[weakref.ref[Tensor], int]]] = {}
        """By optimizer and parameter, the gradient that it stepped on last, and how often that had been written to."""
        self._told = self._told_of_none = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is known of tensors that are there now."""
        return {**self.__dict__, "_stepped_on": {}}

    @contextmanager
    def running(self, on_backward: TakesCare, on_step: Callable[..., None]) -> Iterator[Recorder]:
        """Within it a training step runs.

        Args:
            on_backward: told of `backward` calls on losses.
            on_step: told of every optimizer that has taken a step, whoever asked it to: the Trainer sees only those
                that go through `LightningOptimizer`.
        """
        self.recorder = Recorder()
        told = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: on_step(optimizer))
        try:
            self.recorder.on_backward = on_backward
            yield self.recorder
        finally:
            told.remove()
            self.recorder.contents.release()
            self.recorder = None

    def is_ours(self, module: LightningModule, loss: Tensor, options: dict[str, Any]) -> bool:
        """Whether `loss.backward(...)` differentiates what is being recorded, for parameters.

        Raises:
            ConfigurationError: for parameters and for other tensors at once.
        """
        recorder, inputs = self.recorder, options.get("inputs")
        if recorder is None or recorder.contents.known(loss) is None:
            return False
        if inputs is None:
            return self.reaches(module, loss)
        trained = {id(p) for p in module.parameters()}
        ours = [id(tensor) in trained for tensor in all_of(inputs)]
        if any(ours) and not all(ours):
            raise ConfigurationError(
                "backward(inputs=...) names parameters and other tensors: an update is of parameters alone, and the"
                " others would be left without a gradient. Take theirs by torch.autograd.grad."
            )
        return any(ours)

    def reaches(self, module: LightningModule, loss: Tensor) -> bool:
        """Whether a loss of the running step asks for gradients of parameters, and not of other leaves alone.

        Representations that were computed without gradients are such leaves, where those of the network come later.
        """
        if self.recorder is None:
            return True
        with self.recorder.pausing():
            leaves = graph_of([loss])[0]
        trained = {id(p) for p in module.parameters()}
        return not leaves or any(id(leaf) in trained for leaf in leaves)

    def tell(self, module: LightningModule) -> None:
        """Says once that `loss.backward()` is not what Lightning sees."""
        if not self._told:
            self._told = True
            log.warning(
                "%s.training_step calls loss.backward(): it relaxes, as self.manual_backward(loss) does, but precision"
                " plugins and hooks of the Trainer do not see it. (Said once.)",
                type(module).__name__,
            )

    def tell_if_none(self, module: LightningModule) -> None:
        """Says once that weights have moved, and no relaxation has given any gradient so far."""
        if self._relaxed or self._told_of_none or self.recorder is None:
            return
        names, record = _names(module), self.recorder.record
        read = [(names[id(leaf)], value, leaf) for value, leaf in record.leaves.items() if id(leaf) in names]
        moved = [name for name, value, leaf in read if record.inputs.get(value) is not leaf]  # a copy of before, then
        if moved:
            self._told_of_none = True
            log.warning(
                "%s.training_step has computed with %s and then written to it, and nothing has relaxed in this run so"
                " far: if that was a step along gradients of torch.autograd.grad, the module learns by plain"
                " backpropagation. Call self.manual_backward(loss), and step on what it leaves in .grad. (Said once.)",
                type(module).__name__,
                ", ".join(sorted(moved)),
            )

    def gives(self, module: LightningModule, surrogate: Tensor) -> None:
        """Notes the parameters that get their gradients from a relaxation."""
        names = _names(module)
        self._relaxed.update({names.get(id(leaf), id(leaf)): set() for leaf in graph_of([surrogate])[0]})

    def check_step(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Refuses a step on gradients that no relaxation has given since this optimizer's last one.

        Those of parameters that only scale losses are the losses' own, and those of zero teach nothing. Those that it
        has stepped on, and nobody has touched since, may be stepped on again.
        """
        names = _names(module)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        stepped = [self._relaxed.get(names.get(id(p), id(p))) for p in parameters]
        relaxed = any(by is not None and id(optimizer) not in by for by in stepped)
        last = self._stepped_on.get(id(optimizer), {})
        others = [p for p in parameters if not _is_again(p, last.get(id(p)))]
        if not relaxed and any(_teaches(p) for p in self._weights(module, others)):
            raise ConfigurationError(
                f"{type(optimizer).__name__} took a step on gradients that no relaxation has given: they come from"
                " torch.autograd.grad, torch.func or torch.autograd.backward in training_step, from a copy of the"
                " module, or were written by hand. That is plain backpropagation, or another rule than this algorithm."
                " Call self.manual_backward(loss), of a loss of the module itself, before the step, or use the"
                ' algorithm "backprop".'
            )
        for by in stepped:
            if by is not None:
                by.add(id(optimizer))
        self._stepped_on[id(optimizer)] = {
            id(p): (weakref.ref(g), g._version) for p in parameters if (g := p.grad) is not None
        }

    def _weights(self, module: LightningModule, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Those that flow through the network, or may: matrices that the step has not read itself."""
        if self.recorder is None or not parameters:
            return list(parameters)
        record = self.recorder.settled()
        read = {id(leaf) for leaf in record.leaves.values()}
        feeding = Products(module, record).feeding()
        return [p for p in parameters if id(p) in feeding or (p.ndim > 1 and id(p) not in read)]

    def forget(self) -> None:
        """Drops what it knows of parameters and of the last step."""
        self.recorder = None
        self._relaxed.clear()
        self._stepped_on.clear()
