"""Any torch optimizer, on states instead of parameters."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Stepper
from lightning_ebm.relaxers.fixed_steps import fixed_steps


class StateOptimizer(Relaxer):
    """The states of all layers, as the parameters of ``optimizer(states, **options)``, descending dE/dx.

    A fresh optimizer for every relaxation: moments do not leak from one batch into the next. The trap: Adam and its kin
    take steps of about `lr` however small the force, so that once the loss is small they climb; the report then says
    "max_steps" instead of "fixed", and the log says it once.

    Args:
        optimizer: a `torch.optim.Optimizer` class, or any callable with its signature.
        max_steps: steps taken, exactly.
        options: the optimizer's own, ``lr=0.1``; one that it does not know is an error here, not later.

    Raises:
        ConfigurationError: the optimizer refuses its options, or needs a closure as LBFGS does.
    """

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer], max_steps: int, **options: Any) -> None:
        self.optimizer: Callable[..., torch.optim.Optimizer] = checked.function(
            self, "optimizer", optimizer, "an optimizer's class, such as torch.optim.SGD"
        )
        self.max_steps = checked.count(self, "max_steps", max_steps)
        self.options = {name: _option(self, name, value) for name, value in options.items()}
        if optimizer is torch.optim.LBFGS:
            raise ConfigurationError(
                "StateOptimizer(LBFGS): it re-evaluates a closure within a step, which would hide relaxation steps from"
                " the count. Take torch.optim.SGD with momentum, torch.optim.Adam, or ebm.ErrorCoordinates."
            )
        try:
            variable = torch.ones(1, requires_grad=True)
            made = self._made([variable])
            for _ in range(2 * isinstance(made, torch.optim.Optimizer)):  # some options mean nothing to a first step
                variable.grad = torch.ones(1)
                made.step()
        except Exception as error:
            raise ConfigurationError(f"StateOptimizer(optimizer={self._name}, **{options!r}): {error}") from error
        checked.instance(self, "optimizer", made, torch.optim.Optimizer, "what makes a torch.optim.Optimizer")

    @property
    def _name(self) -> str:
        return getattr(self.optimizer, "__name__", repr(self.optimizer))

    def _made(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        return self.optimizer(variables, **self.options)

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"StateOptimizer({self._name}, max_steps={self.max_steps}{options})"

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        return fixed_steps(self, landscape, "states", self.stepper(start), list(start), strength, self.max_steps)

    @property
    def steps_one_by_one(self) -> int:
        return self.max_steps

    def stepper(self, start: Sequence[Tensor]) -> Stepper:
        variables = [state.clone().requires_grad_() for state in start]
        optimizer = self._made(variables)

        def step(states: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                for variable, state, gradient in zip(variables, states, gradients, strict=True):
                    variable.copy_(state)
                    variable.grad = gradient
            optimizer.step()
            # A copy: the optimizer works in place, and the caller compares a point with the one before.
            return [variable.detach().clone() for variable in variables]

        return step


def _option(owner: object, name: str, value: Any) -> Any:
    """An option of the optimizer's own; of these, torch lets nan and inf pass, and True for a step size."""
    if name == "lr" and not isinstance(value, Tensor):
        return checked.number(owner, name, value, "a step size of at least 0, such as 0.1", least=0)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return checked.number(owner, name, value, "a finite number")
    return value
