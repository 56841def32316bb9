"""The plain network that stands in for one while its evaluations are traced, and what code is told apart by."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_ebm.network.network import Network
from lightning_ebm.relaxers import Relaxation
from lightning_ebm.relaxers.sweep import ArrivingErrors


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
