"""The plain network that stands in for one while its evaluations are traced, and what code is told apart by."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.energies import Energy
from lightning_ebm.network.network import Network
from lightning_ebm.program.code import Key
from lightning_ebm.relaxers import Relaxation
from lightning_ebm.relaxers.sweep import ArrivingErrors
from lightning_ebm.updates.base import Update


class Twin(Network):
    """A network that is traced: what it says of the forward pass comes of that pass, made once somebody asks."""

    is_relaxed = False
    """Whether a free phase has been relaxed: code that asked for its end would keep that one."""

    @property
    def free(self) -> Sequence[Tensor]:
        """x_l at the forward pass."""
        return self._free

    @free.setter
    def free(self, states: Sequence[Tensor]) -> None:
        self._kinds = [(state.shape, state.dtype, state.device) for state in states]

    @cached_property
    def _free(self) -> list[Tensor]:
        return [state.detach() for state in self.first.states]

    @cached_property
    def no_errors(self) -> Sequence[Tensor]:
        """See `Landscape.no_errors`."""
        return [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in self._kinds]

    @property
    def equilibrium(self) -> Sequence[Tensor]:
        if self.is_relaxed:
            raise RuntimeError("The free equilibrium is no part of what code is given: hold it in an End.")
        return self.free


ARRIVING = "rest, errors arriving"
"""The end of a phase whose errors are found where they are read."""


def rebuilt(twin: Network, found: Relaxation, strength: complex, kind: str, tensors: list[Tensor]) -> Relaxation:
    """The end of a phase in a traced evaluation; takes its tensors off the list."""
    count = len(twin.names)

    def taken() -> list[Tensor]:
        front = tensors[:count]
        del tensors[:count]
        return front

    point = list(twin.no_errors) if kind.startswith("rest") else taken()
    errors = ArrivingErrors(twin, strength) if kind == ARRIVING else taken() if kind.endswith("with errors") else None
    pair = (taken(), taken()) if kind == "pairs" else None
    made = Relaxation(point, found.coordinates, "fixed", 0, found.residual, local_error=errors, dyadic_states=pair)
    del made.status, made.steps, made.residual  # which are no part of what code is given: asked for, nothing is traced
    return made


def settings_of(energy: Energy | Update) -> Key | None:
    """What an energy or an update computes with, to tell code of other settings apart; None if that cannot be told."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value._version
        if isinstance(value, Mapping):
            return tuple((name, of(held)) for name, held in value.items())
        if isinstance(value, list | tuple):
            return tuple(map(of, value))
        if value is None or isinstance(value, int | float | complex | str):
            return value
        raise TypeError

    try:
        return (type(energy), *((name, of(value)) for name, value in vars(energy).items()))
    except TypeError:
        return None
