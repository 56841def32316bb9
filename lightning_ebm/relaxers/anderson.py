"""Anderson acceleration of the fixed-point map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.relaxers.base import Landscape, Relaxation, Relaxer, Status, checked_steps, force_norm
from lightning_ebm.relaxers.fixed_point import rounding_of
from lightning_ebm.relaxers.forces import total_energy


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

    needs_error_coordinates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_steps(self, self.max_steps, self.tol)
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise ConfigurationError(f"Anderson(memory={self.memory!r}): expected a whole number of at least 1.")
        if self.coordinates not in ("states", "errors"):
            raise ConfigurationError(f'Anderson(coordinates={self.coordinates!r}): expected "states" or "errors".')

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        in_states = self.coordinates == "states"
        evaluate = landscape.responses if in_states else landscape.error_forces
        point = list(start if in_states else landscape.no_errors)
        moves: list[list[Tensor]] = []
        turns: list[list[Tensor]] = []
        energies, norms, steps = [], [], 0
        last: tuple[list[Tensor], list[Tensor]] | None = None
        while True:
            forces = evaluate(point, strength)
            residual = forces.gradients
            energies.append(total_energy(forces, strength))
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
                moves = [*moves, _less(point, last[0])][-self.memory :]
                turns = [*turns, _less(residual, last[1])][-self.memory :]
            last = point, residual
            steps += 1
            point = _less(point, residual)
            if moves:
                plain = norms[-1] > 2 * norms[-2]
                weights = _least_squares(landscape, turns, residual)
                for i, (move, turn) in enumerate(zip(moves, turns, strict=True)):
                    share = landscape.spread(torch.where(plain, 0.0, weights[:, i]), point)
                    point = [x - s * (m - t) for x, s, m, t in zip(point, share, move, turn, strict=True)]
            point = landscape.feasible(point) if in_states else point
        ratio = norms[-1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
        status: Status = "fixed" if not self.tol else "converged" if bool(settled.all()) else "max_steps"
        return Relaxation(point, self.coordinates, status, steps, ratio, energies)


def _less(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _least_squares(landscape: Landscape, turns: list[list[Tensor]], residual: list[Tensor]) -> Tensor:
    """argmin_a |r - sum_i a_i dr_i| of each sample, ``(B, m)``, by ridged normal equations scaled to unit diagonal."""

    def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return landscape.per_sample([x * y for x, y in zip(a, b, strict=True)])

    gram = torch.stack([torch.stack([product(a, b) for b in turns], -1) for a in turns], -2)
    right = torch.stack([product(a, residual) for a in turns], -1)
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    ridge = 8 * torch.finfo(gram.dtype).eps * torch.eye(len(turns), dtype=gram.dtype, device=gram.device)
    solved, _ = torch.linalg.solve_ex(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2) + ridge, right * scale)
    return torch.nan_to_num(solved * scale, nan=0.0, posinf=0.0, neginf=0.0)
