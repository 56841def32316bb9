"""One pass from the top down."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, overload

import torch
from torch import Tensor

from lightning_ebm.evaluations import EnergyAtRest, ErrorForces, Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer


class ArrivingErrors(Sequence[Tensor]):
    """`d_l = -lambda/Pi_l dL/dx_l` at the forward pass, one tensor a layer, found when somebody reads one.

    They are linear in the loss, so that an update which reads nothing else is computed in one pass with them: what the
    signal meets within a layer is then worked out once for both.

    Args:
        landscape: the network.
        strength: lambda.
    """

    def __init__(self, landscape: Landscape, strength: complex) -> None:
        self._landscape = landscape
        self.strength = strength
        self._count = len(landscape.no_errors)
        self._found: list[Tensor] | None = None
        self._noted: tuple[list[Tensor], float | Tensor] | None = None

    def of(self, landscape: Landscape) -> list[Tensor]:
        """The same of a network that stands for the own one."""
        found = landscape.evaluate(ErrorForces(), landscape.no_errors, self.strength).gradients
        for k, gradient in enumerate(found):  # one layer at a time: nothing is held twice
            found[k] = -gradient
            del gradient
        return found

    def is_of(self, landscape: Landscape) -> bool:
        """Whether this is the network that they are found from, watched or not, and nothing that stands before it."""
        return self._landscape.unwatched is landscape

    def note(self, multiples: list[Tensor], factor: float | Tensor) -> None:
        """Told what they are, times a factor, by whom the pass is used up."""
        self._noted = multiples, factor

    def found(self) -> list[Tensor]:
        """All of them."""
        if self._found is None and self._noted is not None:
            multiples, factor = self._noted
            self._found = [error / factor for error in multiples]
        elif self._found is None:
            self._found = self.of(self._landscape)
        return self._found

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.found())

    @overload
    def __getitem__(self, k: int) -> Tensor: ...
    @overload
    def __getitem__(self, k: slice) -> list[Tensor]: ...
    def __getitem__(self, k: int | slice) -> Tensor | list[Tensor]:
        return self.found()[k]


def arriving(found: Relaxation, landscape: Landscape) -> ArrivingErrors | None:
    """The errors that a relaxation left at the layers, where they can be found again from this network."""
    errors = found.local_error
    return errors if isinstance(errors, ArrivingErrors) and errors.is_of(landscape) else None


@dataclass(frozen=True)
class Sweep(Relaxer):
    """One top-down Gauss-Seidel pass with unit steps: x_l - rho(a_l) = -lambda delta_l, exactly, at any lambda.

    Each layer, from the output down, moves to where its own force vanishes while everything below is still at the free
    point; with unit steps that is the displacement with which the signal *first arrives* there, and its product with
    the layer's prediction is backprop's gradient, with no limit taken. Read as an equilibrium it would not be: the
    states below have moved since. Hence its own update, "first-arrival".

    Source:
        Song et al. 2020 (zero-divergence inference learning); Salvatori et al. 2022 for any graph.
    """

    update: ClassVar[str] = "first-arrival"
    needs_error_coordinates: ClassVar[bool] = True

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        energy = landscape.evaluate(EnergyAtRest(), landscape.no_errors, strength)
        settled = torch.zeros(landscape.batch_size, dtype=energy.dtype, device=energy.device)
        arriving = ArrivingErrors(landscape, strength)
        no_errors = list(landscape.no_errors)
        return Relaxation(no_errors, "errors", "converged", 1, settled, [energy], local_error=arriving)
