"""Anderson acceleration of the fixed-point map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import ErrorForces, Landscape, ResponseForces
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Status, checked_tol, force_norm
from lightning_ebm.relaxers.fixed_point import rounding_of


@dataclass(frozen=True)
class Anderson(Relaxer):
    """x <- (x - sum_i a_i dx_i) - (r - sum_i a_i dr_i), with r = x - response(x) and a = argmin |r - sum_i a_i dr_i|.

    dx_i and dr_i are the last `memory` differences of points and residuals; the least-squares problem is solved sample
    by sample, so a batch behaves as its samples would alone. Where a sample's residual has doubled, its history is
    forgotten for the step and it takes the plain one. Type II of Walker and Ni 2011.

    Args:
        max_steps: how many passes at most.
        memory: how many differences.
        tol: relative residual at which a sample has settled; 0 takes exactly `max_steps`.
        coordinates: "states", the map of `FixedPoint`; "errors", that of `ErrorCoordinates`, for quadratic energies.

    Raises:
        ConfigurationError: an argument out of range; (in use) an energy without that map.
        RelaxationDivergedError: (in use) states ran away.

    Source:
        Walker and Ni, SIAM J. Numer. Anal. 2011.
    """

    max_steps: int = 64
    memory: int = 4
    tol: float = 1e-3
    coordinates: Literal["states", "errors"] = "states"

    @property
    def needs_error_coordinates(self) -> bool:
        return self.coordinates == "errors"

    def __post_init__(self) -> None:
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            tol=checked_tol(self, self.tol),
            memory=checked.count(self, "memory", self.memory),
            coordinates=checked.choice(self, "coordinates", self.coordinates, ("states", "errors")),
        )

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        in_states = self.coordinates == "states"
        what = ResponseForces() if in_states else ErrorForces()
        point = list(start if in_states else landscape.no_errors)
        history = _History(landscape, self.memory)
        energies, norms, steps = [], [], 0
        last: tuple[list[Tensor], list[Tensor]] | None = None
        while True:
            forces = landscape.evaluate(what, point, strength)
            residual = forces.gradients
            energies.append(forces.total(strength))
            norms.append(force_norm(landscape, residual))
            if not bool(torch.isfinite(norms[-1]).all()) or bool(norms[-1].max() > 1e6 * norms[0].max().clamp_min(1)):
                raise RelaxationDivergedError(
                    f"Anderson ran away at nudge {strength:g} after {steps} steps: the map it accelerates has no fixed"
                    " point near the forward pass. Take a smaller nudge, or ebm.GradientDescent with a small step."
                )
            floor = rounding_of(landscape, start) if in_states else torch.zeros_like(norms[0])
            settled = norms[-1] <= (max(self.tol, 4 * landscape.rounding) * norms[0]).maximum(floor)
            if steps == self.max_steps or (self.tol and bool(settled.all())):
                break
            if last is not None:
                history.add(_less(point, last[0]), _less(residual, last[1]))
            last = point, residual
            steps += 1
            point = _less(point, residual)
            if steps > 1:
                point = history.mixed(point, residual, plain=norms[-1] > 2 * norms[-2])
            point = landscape.feasible(point) if in_states else point
        ratio = norms[-1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
        status: Status = "fixed" if not self.tol else "converged" if bool(settled.all()) else "max_steps"
        return Relaxation(point, self.coordinates, status, steps, ratio, energies)


def _less(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


class _History:
    """The last differences of points and residuals; each product of two of them is formed once.

    Args:
        landscape: tells samples apart.
        size: how many are kept.
    """

    def __init__(self, landscape: Landscape, size: int) -> None:
        self._landscape = landscape
        self._size = size
        self._turns: list[list[Tensor]] = []
        self._shifts: list[list[Tensor]] = []  # dx_i - dr_i
        self._products: list[list[Tensor]] = []  # <dr_i, dr_j> for j <= i, each (B,)

    def add(self, move: Sequence[Tensor], turn: list[Tensor]) -> None:
        """One more pair; the oldest goes when there are too many."""
        self._turns = [*self._turns, turn][-self._size :]
        self._shifts = [*self._shifts, _less(move, turn)][-self._size :]
        if len(self._products) == self._size:
            self._products = [row[1:] for row in self._products[1:]]
        self._products.append([self._product(turn, other) for other in self._turns])

    def mixed(self, point: list[Tensor], residual: Sequence[Tensor], plain: Tensor) -> list[Tensor]:
        """The plain step's point moved by what the history knows, but for `plain` samples."""
        weights = torch.where(plain.unsqueeze(-1), 0.0, self._weights(residual))
        for i, shift in enumerate(self._shifts):
            share = self._landscape.spread(weights[:, i], point)
            point = [torch.addcmul(x, s, d, value=-1) for x, s, d in zip(point, share, shift, strict=True)]
        return point

    def _weights(self, residual: Sequence[Tensor]) -> Tensor:
        """argmin_a |r - sum_i a_i dr_i|, ``(B, m)``, by ridged normal equations scaled to unit diagonal."""
        count = len(self._turns)
        gram = torch.stack(
            [torch.stack([self._products[max(i, j)][min(i, j)] for j in range(count)], -1) for i in range(count)], -2
        )
        right = torch.stack([self._product(turn, residual) for turn in self._turns], -1)
        scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
        ridge = 8 * torch.finfo(gram.dtype).eps * torch.eye(count, dtype=gram.dtype, device=gram.device)
        solved, _ = torch.linalg.solve_ex(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2) + ridge, right * scale)
        return torch.nan_to_num(solved * scale, nan=0.0, posinf=0.0, neginf=0.0)

    def _product(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return self._landscape.per_sample([x * y for x, y in zip(a, b, strict=True)])
