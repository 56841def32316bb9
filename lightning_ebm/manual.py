"""Rehearsing a training step under manual optimization, up to one of its backward calls.

A step such as a GAN's calls `manual_backward` several times, with optimizer steps in between, and the k-th call comes
while `training_step` is still running. To see its loss at other states, the step is run again from its beginning with
everything inert that would change something: optimizers, schedulers, clipping, earlier backward calls. Where the real
step had moved parameters in between, the rehearsal puts the values of then back: a loss computed from the old generator
is computed from the old generator again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.purity import shadowed


class _Reached(BaseException):
    """Carries the loss out of a rehearsal; no `except Exception` of the user's stops it."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class ManualStep:
    """What has happened so far in one training step, and its rehearsals.

    Args:
        module: the user's module.
        run: runs its training step.
    """

    def __init__(self, module: LightningModule, run: Callable[[], Any]) -> None:
        self._module = module
        self._run = run
        self.backwards = 0
        self._before_step: list[list[tuple[Parameter, Tensor]]] = []
        self._live: dict[Parameter, Tensor] = {}

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Notes the parameters' values before a real optimizer step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._before_step.append([(p, p.detach().clone()) for p in parameters])
        self._live.update({p: p.data for p in parameters})

    def rehearse(self, number: int) -> Tensor:
        """The loss of the `number`-th backward call, from 0, in its own graph.

        Raises:
            ConfigurationError: the step ends before that call, so it is not the same step twice.
        """
        try:
            with self._inert(number):
                self._run()
        except _Reached as reached:
            return reached.loss
        raise ConfigurationError(
            f"The training step of {type(self._module).__name__} called manual_backward {number + 1} times, and on a"
            " further run with the same batch fewer times: its flow depends on something outside the module that each"
            ' run changes. Relaxing needs runs that repeat; keep such state in the module, or use "backprop".'
        )

    @contextmanager
    def _inert(self, number: int) -> Iterator[None]:
        module, trainer = self._module, self._module.trainer
        calls = 0
        steps = 0

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal calls
            if calls == number:
                raise _Reached(loss)
            calls += 1

        def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            nonlocal steps
            result = closure() if closure is not None else None
            steps += 1
            self._travel(steps)
            return result

        def nothing(*args: Any, **kwargs: Any) -> None:
            """In place of what would change something."""

        present = [(p, p.data) for p in self._live]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        with ExitStack() as stack:
            stack.callback(_put_back, present)
            stack.enter_context(shadowed(module, {"manual_backward": manual_backward, "clip_gradients": nothing}))
            for optimizer in (*trainer.optimizers, *trainer.strategy._lightning_optimizers):
                stack.enter_context(shadowed(optimizer, {"step": step, "zero_grad": nothing}))
            for scheduler in schedulers:
                stack.enter_context(shadowed(scheduler, {"step": nothing}))
            self._travel(0)
            yield

    def _travel(self, steps: int) -> None:
        """Gives every parameter the value it had after that many optimizer steps of this training step."""
        values = dict(self._live)
        for moved in reversed(self._before_step[steps:]):  # the earliest of the later ones has the last word
            values.update(moved)
        _put_back(values.items())


def _put_back(tensors: Iterable[tuple[Parameter, Tensor]]) -> None:
    for parameter, storage in tensors:
        parameter.data = storage
