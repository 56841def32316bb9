"""Curvatures of an energy where it rests: what decides how fast states relax, and whether they rest at all."""

import enum
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.network.network import Network
from lightning_ebm.network.second_derivatives import twice_differentiable
from lightning_ebm.relaxers import Relaxation


class Spectrum(NamedTuple):
    """Eigenvalues of H = d2E/dx2 over the units that are free, of the batch as a whole.

    Attributes:
        eigenvalues: of the Lanczos matrix, ascending, ``(k,)``: the ends are those of H, the inside stands for many.
        weights: the share of H's eigenvalues near each of them, ``(k,)``; they sum to 1.
        smallest: eigenvalue.
        largest: eigenvalue.
    """

    eigenvalues: Tensor
    weights: Tensor

    @property
    def smallest(self) -> float:
        """The smallest curvature, below 0 where states rest at a saddle."""
        return float(self.eigenvalues[0])

    @property
    def largest(self) -> float:
        """The largest curvature: descent is stable up to a step of 2 over it."""
        return float(self.eigenvalues[-1])

    @property
    def condition(self) -> float:
        """largest / smallest; as many steps of descent bring the slowest state nearer by a factor of e, about."""
        return self.largest / self.smallest if self.smallest > 0 else math.inf


class Hessian(enum.Enum):
    """Of what second derivatives are taken."""

    ENERGY = "I + lambda L"
    LOSS = "lambda L"


def spectrum_of(
    network: Network,
    found: Relaxation,
    held: Sequence[Tensor],
    strength: float,
    steps: int,
    seed: int,
    of: Hessian = Hessian.ENERGY,
) -> Spectrum:
    """Lanczos with full reorthogonalization from a random start, on products of H with a vector.

    Args:
        network: whose energy.
        found: where, in states.
        held: of each unit, whether it is.
        strength: lambda.
        steps: k at most; as many as there are free units make it exact.
        seed: of the start.
        of: what is differentiated.
    """
    free = ~torch.cat([flag.flatten() for flag in held])
    product = _product(network, found, strength, free, of)
    vector = torch.randn(int(free.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vector = (vector / vector.norm()).to(found.point[0])
    basis, diagonal, beside = [vector], [], []
    for _ in range(min(steps, len(vector))):
        ahead = product(basis[-1])
        diagonal.append(ahead @ basis[-1])
        done = torch.stack(basis)
        for _ in range(2):  # twice is enough
            ahead = ahead - done.T @ (done @ ahead)
        size = ahead.norm()
        if len(diagonal) == min(steps, len(vector)) or float(size) <= 1e-10 * float(torch.stack(diagonal).abs().max()):
            break
        beside.append(size)
        basis.append(ahead / size)
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.diag(torch.stack(beside), 1)
        matrix = matrix + off + off.T
    if not bool(matrix.isfinite().all()):
        raise RelaxationDivergedError(
            "The second derivatives of the energy are not finite: an operation of the step has none where it was"
            " evaluated, as eigenvalues that coincide, roots and norms of zero have not, so that there is no spectrum."
        )
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(values.detach(), vectors[0].square().detach())


def _product(
    network: Network, found: Relaxation, strength: float, free: Tensor, of: Hessian
) -> Callable[[Tensor], Tensor]:
    shapes = [x.shape for x in found.point]
    with torch.enable_grad():
        seen = network.at_states(found.point)
        total = strength * network.loss(seen)
        if of is Hessian.ENERGY:
            own = network.internal(seen).sum()
            total = own + total if strength else own
        forces = torch.autograd.grad(total, seen.states, create_graph=True, allow_unused=True)
    slopes = [torch.zeros_like(x) if f is None else f for f, x in zip(forces, seen.states, strict=True)]

    def product(vector: Tensor) -> Tensor:
        whole = torch.zeros_like(free, dtype=vector.dtype)
        whole[free] = vector
        rows = torch.split(whole, [s.numel() for s in shapes])
        parts = [p.reshape(s) for p, s in zip(rows, shapes, strict=True)]
        live = [(f, p) for f, p in zip(slopes, parts, strict=True) if f.requires_grad]
        if not live:  # linear in all states
            return torch.zeros_like(vector)
        with twice_differentiable("eigenvalues of them were asked for. Do without"):
            ahead = torch.autograd.grad(
                [f for f, _ in live], seen.states, [p for _, p in live], retain_graph=True, allow_unused=True
            )
        return torch.cat(
            [(torch.zeros_like(x) if a is None else a).flatten() for a, x in zip(ahead, seen.states, strict=True)]
        )[free]

    return product
