"""What is read off the phases of a step.

Letters: x_l state of layer l, mu_l its prediction, e_l = x_l - mu_l, Pi_l precision; all tensors are ``(B, ...)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies import Energy
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Nudge, Phase
from lightning_ebm.nudges.base import table_of
from lightning_ebm.part import Part
from lightning_ebm.promises import is_kept
from lightning_ebm.relaxers import Relaxation, Relaxer

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


class Term(NamedTuple):
    """One contribution ``Re <seed, d output / d theta>`` to the update.

    Attributes:
        output: a function of the parameters, in autograd's graph; any shape.
        seed: the weight of each of its elements, which is a constant; the shape of the output.
    """

    output: Tensor
    seed: Tensor


class End(NamedTuple):
    """A phase and where it ended.

    Attributes:
        phase: the row of the nudge's table.
        found: the states, and what the relaxer left at the layers.
        internal: False leaves out dI/dtheta, so that the loss alone is differentiated at these states.
    """

    phase: Phase
    found: Relaxation
    internal: bool = True

    @property
    def strength(self) -> complex:
        """The weight of the loss in E; 0 where the output is held instead."""
        return 0.0 if self.phase.held else self.phase.strength

    @property
    def weight(self) -> complex:
        """What counts of this phase."""
        return self.phase.weight


class Update(Part, ABC):
    """From the ends of the phases to the gradient that the optimizer is given.

    The update has two halves. `hold` turns what the phases found into numbers: states, or errors at the layers. `read`
    turns these into terms, whose gradient with respect to the parameters is the update while the numbers stay. The
    update is local where each term depends on the parameters of one layer alone (`ebm.testing.check_locality`).

    A subclass writes ``read``; ``return network.terms_of(ends)`` is `sum_p weight_p dE/dtheta` at what is held.
    ``Algorithm(update=MyUpdate())`` uses it, and a relaxer that leaves something of its own names it as its `update`.
    The attributes below say what the update needs of a step.
    """

    name: ClassVar[str] = ""
    """What reports call it; empty is the name of the class."""

    relaxes: ClassVar[bool] = True
    """False leaves the pass to autograd, without layers and phases."""

    incremental: ClassVar[bool] = False
    """Whether parameters move with every single step of the relaxer."""

    second_derivatives: ClassVar[bool] = False
    """Whether `hold` or `read` differentiate forces: attention then runs in single operations."""

    needs_forward_pass: ClassVar[bool] = True
    """False promises that states of the forward pass are not asked for once the phases are over: memory."""

    reads_held_output: ClassVar[bool] = False
    """Whether phases in which the output is held mean something to it."""

    reads_linear_response: ClassVar[bool] = False
    """Whether it can do without a nudged phase, from the slope at the free equilibrium."""

    linear_in_loss: ClassVar[bool] = False
    """A promise: where what the relaxer left is linear in the loss, so is the update. Both may then take one pass."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def check(self, energy: Energy, nudge: Nudge, relaxer: Relaxer) -> None:
        """Refuses parts of an algorithm that this update cannot read.

        Raises:
            ConfigurationError: the relaxer leaves what another update reads, or the nudge moves or holds what this one
                makes nothing of.
        """
        if not self.fits(relaxer):
            raise ConfigurationError(
                f"update={label(self)!r} does not fit {type(relaxer).__name__}, whose result is to be read as"
                f" {label(relaxer.update)!r}: what it leaves at a layer means nothing read otherwise. Leave"
                ' update="auto", or take the relaxer made for that update: Sweep, FixedPrediction, AugmentedLagrangian,'
                " Dyadic."
            )
        if nudge.linear_response and not self.reads_linear_response:
            raise ConfigurationError(
                f'{type(nudge).__name__} moves no state, so there is no {label(self)!r} to read: leave update="auto",'
                " with a relaxer of states for the free phase, such as ebm.FixedPoint(...) or ebm.GradientDescent(...)."
            )
        if nudge.needs_output_state and not self.reads_held_output:
            raise ConfigurationError(
                f"{type(nudge).__name__} holds the output, and what is read of a held output is a contrast of phases,"
                f' not {label(self)!r}. Leave update="auto", with ebm.FixedPoint(...) or ebm.GradientDescent(...).'
            )

    def fits(self, relaxer: Relaxer) -> bool:
        """Whether this update can read what the relaxer leaves: states, unless a subclass says otherwise."""
        return relaxer.ends_in_states or relaxer.update is self

    def phases(self, nudge: Nudge) -> tuple[Phase, ...]:
        """The phases of one step; the nudge's own, unless an update relaxes others, or none."""
        return () if self.reads_linear_response and nudge.linear_response else table_of(nudge)  # others refuse it

    def part(self, before: End, after: End) -> Sequence[End]:
        """What an incremental update reads with one step of the relaxer, from its two ends; parameters then move."""
        raise NotImplementedError(f"{type(self).__name__} is read once the phases are over.")

    def hold(self, network: "Network", ends: Sequence[End]) -> Sequence[End]:
        """What stays as it is while the update is read: numbers, without a graph.

        Args:
            network: see `Network.at_states`, `Network.errors_at`, `Network.loss_slopes`, `Network.at_rest`.
            ends: of the phases, in the order of the table; the free phase of a divergence energy is left out.
        """
        return ends

    @abstractmethod
    def read(self, network: "Network", ends: Sequence[End]) -> Sequence[Term]:
        """The terms of the update. It may run as code that is traced from it, at the same parameters or others.

        Args:
            network: at the parameters of now.
            ends: what `hold` returned: strengths, weights, states and errors. A number that depends on how a phase
                went, such as its residual, is to be worked out in `hold`.
        """


def terms_read(update: Update, network: "Network", ends: Sequence[End]) -> Sequence[Term]:
    """`Update.read`.

    Raises:
        ConfigurationError: what it returns are no terms.
    """
    found: Any = update.read(network, ends)
    terms = found if isinstance(found, list | tuple) else []
    if not terms or not all(map(_is_term, terms)):
        raise ConfigurationError(
            f"{type(update).__name__}.read returned {checked.shown(found)}; expected a list of terms, an output that"
            " autograd can differentiate and its seed in the same shape each, such as network.terms_of(ends)."
        )
    return terms


def _is_term(one: Any) -> bool:
    pair = isinstance(one, tuple) and len(one) == 2 and all(isinstance(x, Tensor) for x in one)
    return pair and one[0].shape == one[1].shape


def is_linear(update: Update) -> bool:
    """Whether it still keeps the promise of `linear_in_loss`."""
    return update.linear_in_loss and is_kept(update, "linear_in_loss", "hold", "read")


def label(update: "str | Update") -> str:
    """What reports and errors call an update."""
    return update if isinstance(update, str) else update.name or type(update).__name__


def samples_of(ends: Sequence[End]) -> list[list[End]] | None:
    """Where relaxers drew samples: the ends at the first sample of each, at the second, and so on; else None."""
    drawn = [end.found.samples for end in ends if end.found.samples is not None]
    if not drawn:
        return None
    count = min(map(len, drawn))
    return [
        [end if (s := end.found.samples) is None else end._replace(found=end.found.at(s[k])) for end in ends]
        for k in range(count)
    ]
