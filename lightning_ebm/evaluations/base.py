"""What a relaxer may ask of the network, and whom it asks.

Letters: ``B`` samples; a list over layers holds one tensor a state, each ``(B, ...)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations.slope import Slope
from lightning_ebm.questions import Questions

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network
    from lightning_ebm.program.products import Product

Result = TypeVar("Result")
Which = tuple[tuple[int, bool], ...]
"""Of each layer that is held, its index, and whether a mask says which of its units."""
Coordinates = Literal["states", "errors"]


class Evaluation(ABC, Generic[Result]):
    """One kind of question about the network at a point; its formula stands in `at`, once.

    The plain network runs the formula, the fast one runs code that is traced from it, and whoever stands in between
    (to watch, to hold states, to count) sees the question and its result. Kinds are compared and hashed by value, so a
    frozen dataclass is what they should be. Results are tensors, or tuples and lists of them.
    """

    coordinates: Coordinates = "states"
    """What the point is written in: states x_l, or errors e_l = x_l - mu_l."""

    composed: ClassVar[bool] = False
    """Whether `at` only asks other questions, so that any `Landscape` can be asked."""

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        """The part of the point that relaxers move, one tensor a layer; the rest is what the question is about."""
        return point

    def where_held(self, held: Which) -> "Evaluation[Result]":
        """The same question in the errors of the units that are free, where others are held; see `HeldErrorForces`.

        Raises:
            ConfigurationError: it has no such form; states are held without.
        """
        raise ConfigurationError(
            f"{type(self).__name__} is asked at errors from the forward pass, and units are held elsewhere."
            " Take ebm.ErrorCoordinates(...), ebm.QuasiNewton(...) or a relaxer of states."
        )

    @property
    def takes_point(self) -> bool:
        """Whether its result takes the place of the point, which need not be held while it is computed."""
        return False

    @property
    def looks(self) -> bool:
        """Whether this is where a watcher looks at the responses: at the beginning and the end of sweeps."""
        return False

    @property
    def watched(self) -> "Evaluation[Result]":
        """The same question, with the energies in its answer that whoever watches wants to see."""
        return self

    @abstractmethod
    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Result:
        """The answer at a point, with the loss weighted by `strength`; a function that leaves no trace."""

    @abstractmethod
    def cost(self, layers: int) -> float:
        """Passes through the network and back that it takes, of a network of so many layers."""

    @abstractmethod
    def flat(self, found: Result) -> list[Tensor]:
        """The tensors of a result, in order."""

    @abstractmethod
    def built(self, tensors: list[Tensor], layers: int) -> Result:
        """The result of which these are the tensors."""

    def slope(self, found: Result) -> Slope | None:
        """The energies and forces in a result; None where it has none."""
        return None

    def with_slope(self, found: Result, change: Callable[[Slope], Slope]) -> Result:
        """The result with other forces in it, for whoever adds to the energy or holds states."""
        return found

    def with_states(self, found: Result, put: Callable[[int, Tensor], Tensor]) -> Result:
        """The result with other states in it; `put` is given the index of a layer and its state."""
        return found


class Landscape(Protocol):
    """All a relaxer may know of the network: the energy as a function of states, one question at a time."""

    @property
    def names(self) -> Sequence[str]:
        """Of the layers."""

    @property
    def depths(self) -> Sequence[int]:
        """How many layers lie on the longest way to each from the input, itself included: 1, 2, ... in a chain."""

    @property
    def batch_size(self) -> int:
        """B."""

    @property
    def rounding(self) -> float:
        """Relative rounding of the network's arithmetic, coarser than that of the states under mixed precision."""

    @property
    def samples_interact(self) -> bool:
        """Whether the force on a sample depends on states of others: BatchNorm in training, losses across a batch."""

    @property
    def conservative(self) -> bool:
        """Whether forces are the slope of the energy: then a rise of it proves that a step was too large."""

    @property
    def weight_products(self) -> "Sequence[Product]":
        """Where states meet weights: what feedback operators may take the place of."""

    @property
    def questions(self) -> Questions:
        """Through which a relaxer reads numbers off the device."""

    @property
    def no_errors(self) -> Sequence[Tensor]:
        """e = 0, where descent on errors starts; the network knows these very tensors and runs no pass for them."""

    @property
    def unwatched(self) -> "Landscape":
        """The same without whoever watches, for questions that are to be no part of a record."""

    def evaluate(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        """What is asked, at a point: ``evaluate(Forces(), states, strength).gradients``.

        Args:
            what: `Forces`, `ErrorForces`, `BestResponses` and their kin.
            point: states or errors, one tensor a layer, as the question says.
            strength: lambda; states are complex where it is.
        """

    def begin(self, strengths: Sequence[complex], held: bool = False) -> None:
        """Told that phases begin: one, or several that are told apart by their strength."""

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """The nearest states at which the energy is finite."""

    def per_sample(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sums each tensor, one for each layer, over all but the batch, then over the layers: ``(B,)``."""

    def metric(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """`sum_l Pi_l <left_l, right_l>` of each sample, ``(B,)``: the scalar product of errors."""

    def over_root_precision(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """t_l / sqrt(Pi_l): white noise as errors of a quadratic energy have it."""

    def norms(self, tensors: Iterable[Tensor]) -> Tensor:
        """|t| of each sample, all layers together, ``(B,)``: the root of `per_sample` of |t|^2."""

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """`sum_k Re <left_k, right_k>` over these layers, of which both lists hold one tensor each: ``(B,)``."""

    def spread(self, values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """One number a sample ``(B,)`` shaped to multiply each tensor of the list."""


class Around:
    """A `Landscape` that hands every question on to another; a subclass writes `evaluate`.

    Args:
        landscape: the one that knows the answers.
    """

    def __init__(self, landscape: Landscape) -> None:
        self.inner = landscape

    @property
    def names(self) -> Sequence[str]:
        """See `Landscape.names`."""
        return self.inner.names

    @property
    def depths(self) -> Sequence[int]:
        """See `Landscape.depths`."""
        return self.inner.depths

    @property
    def batch_size(self) -> int:
        """See `Landscape.batch_size`."""
        return self.inner.batch_size

    @property
    def rounding(self) -> float:
        """See `Landscape.rounding`."""
        return self.inner.rounding

    @property
    def samples_interact(self) -> bool:
        """See `Landscape.samples_interact`."""
        return self.inner.samples_interact

    @property
    def conservative(self) -> bool:
        """See `Landscape.conservative`."""
        return self.inner.conservative

    @property
    def weight_products(self) -> "Sequence[Product]":
        """See `Landscape.weight_products`."""
        return self.inner.weight_products

    @property
    def questions(self) -> Questions:
        """See `Landscape.questions`."""
        return self.inner.questions

    @property
    def no_errors(self) -> Sequence[Tensor]:
        """See `Landscape.no_errors`."""
        return self.inner.no_errors

    @property
    def unwatched(self) -> Landscape:
        """See `Landscape.unwatched`."""
        return self

    def evaluate(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        """See `Landscape.evaluate`."""
        asked: Any = self  # composed questions ask others, each of which comes through here
        return what.at(asked, point, strength) if what.composed else self.answer(what, point, strength)

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        """The answer to a question that is not composed of others."""
        return self.inner.evaluate(what, point, strength)

    def begin(self, strengths: Sequence[complex], held: bool = False) -> None:
        """See `Landscape.begin`."""
        self.inner.begin(strengths, held)

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`."""
        return self.inner.feasible(states)

    def per_sample(self, tensors: Iterable[Tensor]) -> Tensor:
        """See `Landscape.per_sample`."""
        return self.inner.per_sample(tensors)

    def metric(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """See `Landscape.metric`."""
        return self.inner.metric(left, right)

    def over_root_precision(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Landscape.over_root_precision`."""
        return self.inner.over_root_precision(tensors)

    def norms(self, tensors: Iterable[Tensor]) -> Tensor:
        """See `Landscape.norms`."""
        return self.inner.norms(tensors)

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """See `Landscape.products`."""
        return self.inner.products(left, right, layers)

    def spread(self, values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """See `Landscape.spread`."""
        return self.inner.spread(values, like)
