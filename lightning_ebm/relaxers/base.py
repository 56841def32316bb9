"""What a relaxer is, and what it gives back.

Letters: ``B`` samples; a list over layers holds one tensor a state, each ``(B, ...)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import QuadraticEnergy, is_quadratic
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations import Evaluation, Forces, Landscape
from lightning_ebm.evaluations.of_slope import SlopeEvaluation
from lightning_ebm.nudges import Nudge
from lightning_ebm.part import Part
from lightning_ebm.promises import is_kept

if TYPE_CHECKING:
    from lightning_ebm.updates.base import Update

Status = Literal["converged", "kink", "stalled", "max_steps", "fixed"]
Coordinates = Literal["states", "errors"]


@dataclass
class Relaxation:
    """Where a relaxation ended and how it went.

    Attributes:
        point: states x_l, or errors e_l, one tensor a layer.
        coordinates: which of the two `point` holds.
        status: "converged" (every sample within tolerance), "kink" (no energy is left to gain though forces
            remain, as at the kinks of ReLU and maximum pooling), "stalled" (the energy falls no further though it is
            smooth and forces remain, or ends there, as log(p) at 0), "max_steps" (still moving when the count was
            up) or "fixed" (a number of steps was asked for and taken).
        steps: steps taken by the slowest sample.
        residual: |force| at the end over |force| at the start, per sample, ``(B,)``; 0 where nothing pulled.
        energies: total energy I + lambda L of the batch, scalars: at the start and after each step. Where
            only some samples took a step, the value before it, which bounds theirs. Of relaxers that need no energy
            to move (`FixedPoint`, `Dyadic`), at the start and at the end only.
        local_error: what is to be read against each layer's prediction instead of its error at `point`: the error as
            it first arrives, with everything else still at the forward pass, or a multiplier over the precision.
        samples: states that the update is the average over, instead of that at `point`; lists as `point` is.
        dyadic_states: two more lists of states, whose energies, with the drives of `point`, are to be contrasted.
        gain_left: the energy still to be gained, at most about, over what was gained, a scalar; None where nobody has
            estimated it.
        pull_left: `2 (E_start - E_end) / |dE/de at e = 0|^2`, a scalar: with how much of its first force the loss still
            pulls, on the way as a whole. 1 under a vanishing nudge; under a quadratic loss 1 / (1 + lambda k), k its
            curvature as errors feel it. None where nobody has measured it.
    """

    point: list[Tensor]
    coordinates: Coordinates
    status: Status
    steps: int
    residual: Tensor
    energies: Sequence[Tensor] = ()
    local_error: Sequence[Tensor] | None = None
    dyadic_states: tuple[list[Tensor], list[Tensor]] | None = None
    samples: list[list[Tensor]] | None = None
    gain_left: Tensor | None = None
    pull_left: Tensor | None = None

    def at(self, sample: list[Tensor]) -> "Relaxation":
        """One of its samples, as an end of its own."""
        return replace(self, point=sample, samples=None)

    def in_states(self, states_of: Callable[[list[Tensor]], list[Tensor]]) -> "Relaxation":
        """The same end of a phase, written in states, which are what `states_of` makes of errors."""
        samples = None if self.samples is None else [states_of(sample) for sample in self.samples]
        return replace(self, point=states_of(self.point), coordinates="states", samples=samples)


class Relaxer(Part, ABC):
    """Moves states from the free point `start` towards equilibrium of I + strength * loss."""

    update: "ClassVar[str | Update]" = "contrast"
    """The update that its result is made for, by name or as an object; ``update="auto"`` takes it."""

    tol: float = 0.0
    """Relative residual at which a sample has settled; 0 where a number of steps is taken."""

    max_steps: int = 0
    """How many steps at most; 0 where that means nothing."""

    decides_together: ClassVar[bool] = False
    """Whether several phases should be given to `relax_all` at once, as one choice is made for all."""

    @property
    def complex_states(self) -> bool:
        """Whether it can follow a complex nudge; a subclass says so by an attribute, ``complex_states = True``."""
        return False

    @property
    def needs_error_coordinates(self) -> bool:
        """Whether the energy must be quadratic in errors, as `PredictiveCoding` is; set as `complex_states` is."""
        return False

    @property
    def draws_samples(self) -> bool:
        """Whether it leaves an equilibrium at which it starts, as what moves at a temperature does."""
        return False

    @property
    def trusts_energy(self) -> bool:
        """Whether it decides by the energy, or by forces as its slope, where they may not be off: what searches does.

        Relaxers around it that change forces, such as `Feedback`, refuse it.
        """
        return False

    @property
    def ends_in_states(self) -> bool:
        """Whether it ends in states at which an energy can be differentiated, and leaves nothing else to be read."""
        return self.update == "contrast"

    @property
    def ends_elsewhere(self) -> bool:
        """Whether it ends where no relaxer of the network's own energy would, as one under noise does."""
        return False

    @property
    def goes_into_graphs(self) -> bool:
        """Whether a graph can be made of it, see `Equilibrium.exported`: no number that it reads has to steer it."""
        return False

    @property
    def steps_by(self) -> SlopeEvaluation:
        """What `stepper` is to be given as gradients."""
        return Forces()

    @property
    def steps_one_by_one(self) -> int:
        """How many moves of `stepper` stand for one relaxation; 0 where it does not move that way."""
        return 0

    def check(self, energy: Energy, nudge: Nudge) -> None:
        """Refuses an energy or a nudge that this relaxer would not see.

        Raises:
            ConfigurationError: it moves errors, and the energy is no function of those or the nudge holds the output;
                or states are complex, and it cannot follow.
        """
        self.check_energy(energy)
        if nudge.needs_output_state and self.needs_error_coordinates:
            raise ConfigurationError(
                f"{type(nudge).__name__} holds the output, and {type(self).__name__} moves errors, of which the output"
                " is a function. Take ebm.FixedPoint(...) or ebm.GradientDescent(...)."
            )
        if nudge.complex_states and not self.complex_states:
            raise ConfigurationError(
                f"{type(self).__name__} cannot follow the complex states of a holomorphic nudge,"
                f" {type(nudge).__name__}. Take ebm.FixedPoint(...), ebm.GradientDescent(lr, max_steps) or"
                " ebm.ErrorCoordinates(..., tol=0)."
            )

    def check_energy(self, energy: Energy) -> None:
        """The part of `check` that concerns a free phase as well."""
        if self.needs_error_coordinates and not is_quadratic(energy):
            overridden = isinstance(energy, QuadraticEnergy)
            why = "overrides layer_energy, so that its energy is another" if overridden else "is no function of those"
            raise ConfigurationError(
                f"{type(self).__name__} moves prediction errors under the energy 1/2 Pi |error|^2, and"
                f" {type(energy).__name__} {why}: it would never be looked at. Use ebm.PredictiveCoding(), or a"
                " relaxer of states such as ebm.GradientDescent(...)."
            )

    def around(self, landscape: Landscape) -> Landscape:
        """What single steps are to see in place of the network: the network, unless it stands in front of it."""
        return landscape

    @abstractmethod
    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        """Relaxes. Must raise `RelaxationDivergedError` rather than return states that ran away.

        Where `complex_states` is set, `strength` may be complex; the states then have to be.

        Args:
            landscape: the network, to be asked by `landscape.evaluate(what, point, strength)`.
            start: the free point, one tensor a layer, samples first; not to be written to.
            strength: lambda, the weight of the loss per sample; 0 in a free phase.
        """

    def relax_all(
        self, landscape: Landscape, start: Sequence[Tensor], strengths: Sequence[complex]
    ) -> list[Relaxation]:
        """The relaxations at several strengths, each from `start`."""
        relaxer: Any = self  # whose strength may be complex where `complex_states` says so
        return [relaxer.relax(landscape, start, strength) for strength in strengths]

    def plain_sweep(self, landscape: Landscape) -> Evaluation[list[Tensor]] | None:
        """One of its steps without what it adds to hasten them; None where it does not move by sweeps."""
        return None

    def stepper(self, start: Sequence[Tensor]) -> "Stepper":
        """One move at a time from `start`, for updates that change parameters between moves.

        Raises:
            ConfigurationError: this relaxer chooses its moves by looking at several of them.
        """
        raise ConfigurationError(
            f"{type(self).__name__} does not move one step at a time, as an incremental update needs. Take"
            " ebm.GradientDescent(lr, max_steps) or ebm.StateOptimizer(torch.optim.SGD, max_steps=..., lr=...)."
        )


def check_single_steps(relaxer: Relaxer) -> None:
    """Refuses single steps that are those of another relaxer.

    Raises:
        ConfigurationError: a subclass overrides `relax` and inherits the `stepper` that belonged to its parent's.
    """
    if not is_kept(relaxer, "stepper", "relax"):
        name = type(relaxer).__name__
        raise ConfigurationError(
            f"{name} overrides relax and inherits stepper, whose single moves are its parent's: an incremental update"
            f" takes those alone, and would never see {name}'s. Write {name}.stepper too, or say that they are the"
            f" same, stepper = {type(relaxer).__base__.__name__}.stepper."  # type: ignore[union-attr]
        )


Stepper = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""The next states from those of now and the gradient there."""


def checked_tol(owner: object, tol: Any) -> float:
    """`tol`, if it can be one."""
    wanted = "a fraction of the force that started the relaxation, 0 <= tol < 1, where 0 means exactly max_steps steps"
    return checked.number(owner, "tol", tol, wanted, least=0, below=1)


def checked_lr(owner: object, lr: Any, example: float) -> float:
    """`lr`, if it can be a step size."""
    return checked.number(owner, "lr", lr, f"a positive step size, such as {example}", above=0)


def force_norm(landscape: Landscape, gradients: Iterable[Tensor]) -> Tensor:
    """|dE/dx| of each sample, ``(B,)``."""
    return landscape.norms(gradients)


def as_complex(states: Sequence[Tensor], strength: complex) -> list[Tensor]:
    """The states, complex where the nudge is."""
    return [state + 0j for state in states] if isinstance(strength, complex) else list(states)
