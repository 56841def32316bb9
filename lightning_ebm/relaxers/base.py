"""The waist of the library: the network as a function of its states, and what a relaxer gives back.

Letters: ``B`` samples; a list over layers holds one tensor a state, each ``(B, ...)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.relaxers.forces import Forces

Status = Literal["converged", "stalled", "max_steps", "fixed"]


class Landscape(Protocol):
    """All a relaxer may know of the network."""

    names: Sequence[str]
    depths: Sequence[int]
    """Of each layer, how many lie on the longest way to it from the input, itself included: 1, 2, ... in a chain."""
    batch_size: int
    rounding: float
    """Relative rounding of the network's arithmetic, coarser than that of the states under mixed precision."""

    @property
    def no_errors(self) -> Sequence[Tensor]:
        """e = 0, where descent on errors starts; the network knows these very tensors and runs no pass for them."""

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """E and dE/dx at the given states, loss weighted by `strength`; complex states where that is complex."""

    def error_forces(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """The same at x_l = rho(a_l) + e_l, as a function of the errors e."""

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """E and, as gradients, x_l - argmin_x [e_l(x) - <pull_l, x>], whose unit step is each layer's best response."""

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """argmin_x [e_l(x) - <pull_l, x>] of these layers, and nothing else: no energy, no other layer."""

    def energy_of(self, states: Sequence[Tensor], strength: complex) -> Tensor:
        """I + lambda L of the batch, a scalar, its real part where the nudge is complex."""

    def hops(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """e_l + 1/Pi_l (lambda dL/dx_l - sum_k J_k' Pi_k e_k), all slopes and Jacobians taken at the forward pass."""

    def dyads(self, mean: Sequence[Tensor], strength: float) -> tuple[list[Tensor], list[Tensor], Forces]:
        """Pairs of states around `mean` that answer half the pull from above, and half its opposite, top down.

        z_l^+- = argmin_x [e_l(x, a_l) -+ <pull_l, x> / 2], pull_l = -d/dx_l [sum_k e_k(z_k^+) - e_k(z_k^-) + lambda L],
        with every drive and Jacobian taken at the mean. As gradients: mean - (z^+ + z^-) / 2.
        """

    # A landscape may also have `descended`, a step along the forces in one piece: see `FastNetwork`.

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """The nearest states at which the energy is finite."""

    def per_sample(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sums each tensor, one for each layer, over all but the batch, then over the layers: ``(B,)``."""

    def metric(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """sum_l Pi_l <left_l, right_l> of each sample, ``(B,)``: the scalar product of errors."""

    def norms(self, tensors: Iterable[Tensor]) -> Tensor:
        """|t| of each sample, all layers together, ``(B,)``: the root of `per_sample` of |t|^2."""

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """sum_k Re <left_k, right_k> over these layers, of which both lists hold one tensor each: ``(B,)``."""

    def spread(self, values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """One number a sample ``(B,)`` shaped to multiply each tensor of the list."""


@dataclass
class Relaxation:
    """Where a relaxation ended and how it went.

    Attributes:
        point: states x_l, or errors e_l, one tensor a layer.
        coordinates: which of the two `point` holds.
        status: "converged" (every sample within tolerance), "stalled" (the energy falls no further though forces
            remain, as at the kinks of ReLU), "max_steps" (still moving when the count was up) or "fixed" (a number of
            steps was asked for and taken).
        steps: steps taken by the slowest sample.
        residual: |force| at the end over |force| at the start, per sample, ``(B,)``; 0 where nothing pulled.
        energies: total energy I + lambda L of the batch, scalars: at the start and after each step. Where
            only some samples took a step, the value before it, which bounds theirs. Of relaxers that need no energy
            to move (`FixedPoint`, `Dyadic`), at the start and at the end only.
        displacement: what is to be read against each layer's prediction instead of its error at `point`: the error as
            it first arrives, with everything else still at the forward pass, or a multiplier over the precision.
        dyad: two more lists of states, whose energies, with the drives of `point`, are to be contrasted.
    """

    point: list[Tensor]
    coordinates: Literal["states", "errors"]
    status: Status
    steps: int
    residual: Tensor
    energies: Sequence[Tensor] = ()
    displacement: list[Tensor] | None = None
    dyad: tuple[list[Tensor], list[Tensor]] | None = None


class Relaxer(ABC):
    """Moves states from the free point `start` towards equilibrium of I + strength * loss."""

    update: ClassVar[Literal["contrast", "first-arrival", "fixed-prediction", "multipliers", "dyadic"]] = "contrast"
    """How its result is meant to be read; see `Algorithm.update`."""

    complex_states: ClassVar[bool] = False
    """Whether it can follow a complex nudge."""

    needs_error_coordinates: ClassVar[bool] = False
    """Whether the energy must be a quadratic of errors, see `QuadraticEnergy`."""

    @abstractmethod
    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        """Relaxes. Must raise `RelaxationDivergedError` rather than return states that ran away.

        Where `complex_states` is set, `strength` may be complex; the states then have to be.
        """

    def stepper(self, start: Sequence[Tensor]) -> "Stepper":
        """One move at a time from `start`, for updates that change parameters between moves.

        Raises:
            ConfigurationError: this relaxer chooses its moves by looking at several of them.
        """
        raise ConfigurationError(
            f"{type(self).__name__} does not move one step at a time, as an incremental update needs. Take"
            " ebm.GradientDescent(lr, max_steps) or ebm.StateOptimizer(torch.optim.SGD, max_steps=..., lr=...)."
        )


Stepper = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""The next states from those of now and the gradient there."""


def checked_steps(owner: object, max_steps: int, tol: float) -> None:
    """Refuses counts and tolerances that cannot be meant."""
    name = type(owner).__name__
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ConfigurationError(f"{name}(max_steps={max_steps!r}): expected a whole number of at least 1.")
    if not 0 <= tol < 1:
        raise ConfigurationError(
            f"{name}(tol={tol!r}): the tolerance is a fraction of the force that started the relaxation; expected"
            " 0 <= tol < 1, where 0 means exactly max_steps steps."
        )


def force_norm(landscape: Landscape, gradients: Iterable[Tensor]) -> Tensor:
    """|dE/dx| of each sample, ``(B,)``."""
    return landscape.norms(gradients)


def as_complex(states: Sequence[Tensor], strength: complex) -> list[Tensor]:
    """The states, complex where the nudge is."""
    return [state + 0j for state in states] if isinstance(strength, complex) else list(states)
